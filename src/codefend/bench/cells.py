"""The cells of the evaluation grid, one figure each, and the names of their rows, image files and random streams."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import NamedTuple

from codefend.bench.config import EvalConfig
from codefend.bench.results import BARE, eps_label


class Cell(NamedTuple):
    """One figure: ``eps`` as in the config's list, 0 for clean cells and for attacks with a bound of their own."""

    task: str
    attack: str
    eps: float
    threat: str
    defense: str


def source_cell(config: EvalConfig, cell: Cell) -> Cell:
    """The cell with the defense that its attack goes through: what attacked images and their seeds depend on.

    A transfer attack from another victim without a surrogate defense is the oblivious attack on that victim.
    """
    if config.craft_victim and not config.surrogate:
        return cell._replace(threat="T0", defense=BARE)
    return cell._replace(defense={"T0": BARE, "T1": config.surrogate}.get(cell.threat, cell.defense))


def row_key(config: EvalConfig, cell: Cell, example_id: str) -> str:
    """The key of a row, unique in its run."""
    label = eps_label(config.radius(cell.eps), config.norm)
    return " | ".join((cell.task, cell.defense, cell.threat, cell.attack, label, example_id))


def noise_names(cell: Cell, batch: int) -> tuple[object, ...]:
    """What the noise of the judged defense is derived from, next to the seed and the number of the submission."""
    return ("judge", *cell, batch)


def cell_folder(config: EvalConfig, cell: Cell) -> Path:
    """The folder of a cell's files, inside a folder of the run."""
    label = eps_label(config.radius(cell.eps), config.norm)
    parts = (cell.task, cell.attack, label, f"{cell.threat}-{cell.defense}")
    return Path(*(slug(part) for part in parts))


def attacked_path(folder: Path, config: EvalConfig, source: Cell, batch: int) -> Path:
    """Where the run in ``folder`` stores the attacked images of one batch."""
    return folder / "attacked" / cell_folder(config, source) / f"{batch:05d}.safetensors"


def slug(text: object) -> str:
    """A file name for any label, different for different labels."""
    name = re.sub(r"[^A-Za-z0-9.=_-]+", "_", str(text)).strip(".")[:80]
    return name if name and name == str(text) else f"{name}-{hashlib.sha256(str(text).encode()).hexdigest()[:6]}"
