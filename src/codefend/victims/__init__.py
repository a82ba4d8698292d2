"""Victims by name. Importing this module imports neither torch nor Transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from codefend.registry import lookup

if TYPE_CHECKING:
    from codefend.types import WhiteBox

WEIGHTS = Path(__file__).resolve().parents[1] / "weights"


@dataclass(frozen=True)
class VictimSpec:
    """A line of ``codefend list victims`` and the function that loads it."""

    name: str
    summary: str
    build: Callable[[], WhiteBox]


def _pocket(folder: Path) -> WhiteBox:
    from codefend.victims.pocket import load_pocket

    return load_pocket(folder)


VICTIMS: dict[str, VictimSpec] = {
    "pocket": VictimSpec(
        "pocket",
        "SmolLM2-135M reading EfficientNet-Lite0 tokens; embedded, white-box, runs on two CPU cores",
        lambda: _pocket(WEIGHTS / "pocket"),
    ),
}


def load(name: str) -> WhiteBox:
    """The victim ``name``, or the pocket whose weights lie in the folder ``name``.

    Raises UserError for an unknown name (the nearest are named), a folder without weights, or a missing package.
    """
    if name not in VICTIMS and (Path(name).is_dir() or "/" in name):
        return _pocket(Path(name))
    return lookup("victim", name, VICTIMS).build()
