"""The transfer matrix: attacks made on each of several victims, judged on all of them and on black boxes.

Each pair is a run of its own in a folder of the matrix: it resumes, is checked and can be reported like any other. The
images of one crafter are made once: its other pairs reuse them, verified.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from functools import cache
from pathlib import Path

from codefend.bench.config import EvalConfig, TransferConfig, check
from codefend.bench.grid import run_grid
from codefend.bench.results import slug
from codefend.bench.setup import Loaders
from codefend.core.runs import Row, open_run
from codefend.types import CodefendError


def pairs(config: TransferConfig) -> Iterator[tuple[str, EvalConfig]]:
    """Folder and config of every pair; each crafter's own run comes before those that reuse its images."""
    shared = {field.name: getattr(config, field.name) for field in fields(EvalConfig)}
    for crafter in config.crafters:
        for judge in dict.fromkeys((crafter, *config.crafters, *config.judges)):
            own = judge == crafter
            changes = {"victim": judge, "craft_victim": "" if own else crafter, "threats": ("T0",)}
            yield pair_folder(crafter, judge), EvalConfig(**shared | changes)


def pair_folder(crafter: str, judge: str) -> str:
    """The folder, inside the matrix's, of attacks made on one victim and judged on another."""
    return f"{slug(crafter)}--{slug(judge)}"


def check_matrix(config: TransferConfig) -> None:
    """Raise CodefendError for a matrix of one victim, or for settings that only a single run has."""
    victims = [*config.crafters, *config.judges]
    if not config.crafters:
        raise CodefendError("crafters is empty; name the victims that attacks are made on")
    if len(set(victims)) < 2:
        raise CodefendError("a transfer matrix needs two victims or more; set crafters=A,B or judges=C")
    if len(set(victims)) < len(victims):
        raise CodefendError("crafters and judges name a victim twice; crafters are judged anyway")
    for name in ("victim", "craft_victim", "surrogate", "attacked", "threats"):
        if getattr(config, name) != getattr(TransferConfig(), name):
            raise CodefendError(f"a transfer matrix has no {name}; its victims are crafters and judges")
    for _, single in pairs(config):
        check(single)


def run_matrix(
    config: TransferConfig, run_dir: str | Path, loaders: Loaders | None = None, workers: int = 1
) -> list[Row]:
    """Fill every pair's run folder and return all rows; the same call resumes. Raises CodefendError as ``evaluate``."""
    check_matrix(config)
    if workers > 1:
        raise CodefendError("a transfer matrix runs in one process; evaluate its pairs with --workers instead")
    loaders = loaders or Loaders()
    loaders = replace(loaders, victim=cache(loaders.victim))  # loading one takes seconds
    folder, rows = Path(run_dir), []
    with open_run(folder, config.recorded()):
        for name, single in pairs(config):
            crafter = single.craft_victim
            donor = folder / pair_folder(crafter, crafter) if crafter else None
            rows += run_grid(single, folder / name, loaders, donor=donor)
    return rows
