"""Where an evaluation finds victims, tasks, purifiers and prompt policies by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from codefend.purifiers.base import Purifier
from codefend.types import Task, Victim


def _victim(name: str) -> Victim:
    from codefend.victims import load

    return load(name)


def _task(name: str, split: str, limit: int | None, **options: Any) -> Task:
    from codefend.tasks import load

    return load(name, split=split, limit=limit, **options)


def _purifier(name: str, **options: Any) -> Purifier:
    from codefend.purifiers import load

    return load(name, **options)


def _policy(name: str) -> Callable[[str], str]:
    from codefend.prompts import load_any

    return load_any(name)


@dataclass(frozen=True)
class Loaders:
    """One function for each kind of object; the defaults look names up in the registries."""

    victim: Callable[[str], Victim] = _victim
    task: Callable[..., Task] = _task  # (name, split, limit, **options)
    purifier: Callable[..., Purifier] = _purifier  # (name, **options)
    policy: Callable[[str], Callable[[str], str]] = _policy  # name or file of a prompt policy
