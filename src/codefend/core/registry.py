"""Look up names in registries, where objects may stand as ``"module:name"`` until they are needed."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from importlib import import_module
from typing import Any, TypeVar

from codefend.types import CodefendError

T = TypeVar("T")


def lookup(kind: str, name: str, table: Mapping[str, T]) -> T:
    """Return ``table[name]``. Raises CodefendError naming the nearest entries of the table when there is none."""
    if name in table:
        return table[name]
    near = get_close_matches(name, table, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {', '.join(sorted(table))}"
    raise CodefendError(f"unknown {kind} {name!r}; {hint} (`codefend list {kind}s` shows all)")


def resolve(place: str) -> Any:
    """Import the object that ``"module:name"`` names."""
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)
