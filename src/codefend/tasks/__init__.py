"""Tasks: what the victim is asked, and who judges the answers.

This module imports no torch, so that ``codefend list tasks`` is quick.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from codefend.core.registry import lookup
from codefend.types import CodefendError

if TYPE_CHECKING:
    from codefend.types import Task


@dataclass(frozen=True)
class TaskSpec:
    """A line of ``codefend list tasks`` and the function that loads the task: ``build(split, limit, **options)``."""

    name: str
    summary: str
    build: Callable[..., Task]


def _scenes(kind: str, style_split: str) -> Callable[[str, int | None], Task]:
    def build(split: str, limit: int | None) -> Task:
        from codefend.tasks.scene_tasks import load_scenes

        if style_split == "shift":
            if split != "test":
                raise CodefendError("the shift sets have a test split only")
            split = "shift"
        return load_scenes(kind, split, limit=limit)

    return build


def _easyvqa(split: str, limit: int | None) -> Task:
    from codefend.tasks.easyvqa import load_easyvqa

    return load_easyvqa(split, limit=limit)


def _photographs(split: str, limit: int | None, **options: Any) -> Task:
    from codefend.tasks.photographs import load_photographs

    return load_photographs(split, limit, **options)


TASKS: dict[str, TaskSpec] = {
    spec.name: spec
    for spec in (
        TaskSpec(
            "caption", "caption composed scenes of 1 to 4 objects (512 frozen test images)", _scenes("caption", "")
        ),
        TaskSpec("vqa", "questions of six kinds on the same scenes", _scenes("vqa", "")),
        TaskSpec("caption-shift", "captioning in a second drawing style (256 images)", _scenes("caption", "shift")),
        TaskSpec("vqa-shift", "questions in a second drawing style", _scenes("vqa", "shift")),
        TaskSpec("easy-vqa", "coloured shapes, made by others (Zhou 2019; the easy-vqa package)", _easyvqa),
        TaskSpec(
            "photographs", "crops of held-out photographs: how far features and answers are restored", _photographs
        ),
    )
}


def load(name: str, *, split: str = "test", limit: int | None = None, **options: Any) -> Task:
    """The task ``name``. ``split`` is "test" (frozen, shipped), or "val"/"train" where the task has them.

    ``options`` are the task's own, such as ``side`` and ``folder`` of photographs. Raises CodefendError for an unknown name (the nearest are named), an unknown split, or a limit below 1.
    """
    if limit is not None and limit < 1:
        raise CodefendError(f"limit must be 1 or more, not {limit}")
    return lookup("task", name, TASKS).build(split, limit, **options)
