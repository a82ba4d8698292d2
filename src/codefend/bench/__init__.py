"""The grid tasks x attacks x eps x threats x defenses, cell by cell, into the rows of a run folder.

``config``: what to evaluate. ``bench``: what was loaded for it. ``craft``: attacked images. ``judge``: answers, scores
and rows. ``reuse``: attacked images of another run. ``transfer``: attacks from victim to victim. This module imports no
torch, so that presets can be listed quickly.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from codefend.bench.config import AttackChoice, DefenseChoice, EvalConfig, TransferConfig

if TYPE_CHECKING:
    from codefend.bench.photographs import PhotographsConfig
    from codefend.bench.setup import Loaders
    from codefend.core.runs import Row

__all__ = ["AttackChoice", "DefenseChoice", "EvalConfig", "TransferConfig", "evaluate"]


def evaluate(
    config: EvalConfig | PhotographsConfig, run_dir: str | Path, *, loaders: Loaders | None = None
) -> list[Row]:
    """Evaluate what ``config`` names into ``run_dir`` and return all rows; the same call resumes after a kill.

    A ``TransferConfig`` fills a folder with one run for each pair of victims, a ``PhotographsConfig`` with rows of its
    own kind and a table.
    ``loaders`` replaces the look-up of victims, tasks and purifiers by name, for your own objects.
    Raises CodefendError for unknown names, a setting out of range, or a folder made with another config.
    """
    if isinstance(config, TransferConfig):
        from codefend.bench.transfer import run_matrix

        return run_matrix(config, run_dir, loaders)
    if not isinstance(config, EvalConfig):
        from codefend.bench.photographs import run_photographs

        return run_photographs(config, run_dir)
    from codefend.bench.loop import run_grid

    return run_grid(config, run_dir, loaders)
