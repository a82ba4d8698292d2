"""The bench: the grid tasks x attacks x eps x threats x defenses, cell by cell, into the rows of a run folder.

``config``: what to evaluate. ``setup`` loads it; ``tasks``: examples and metrics. ``grid``: the loop over the cells.
``judge``: the rows of one batch, from ``craft`` (attacked images of a cell, by ``attacking``) or ``reuse`` (those of
another run) to answers and scores. ``transfer``: attacks from victim to victim, ``seeds``: one
evaluation with several seeds. ``results``, ``sanity`` and ``report`` read the rows.

For other evaluations and searches, the same parts without the grid: `setup.Loaders` and `setup.load_defense` load by
name, `tasks.same_size_batches` batches examples, `attacking.AttackGoal` and `attacking.attack_batch` make attacked
images. This module imports no torch, so that presets can be listed quickly.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from codefend.bench.config import (
    AttackChoice,
    DefenseChoice,
    EvalConfig,
    PhotographsConfig,
    SeedsConfig,
    TransferConfig,
)
from codefend.types import CodefendError

if TYPE_CHECKING:
    from codefend.bench.setup import Loaders
    from codefend.core.processes import StartPool
    from codefend.core.runs import Row

__all__ = [
    "AttackChoice",
    "DefenseChoice",
    "EvalConfig",
    "PhotographsConfig",
    "SeedsConfig",
    "TransferConfig",
    "evaluate",
]


def evaluate(
    config: EvalConfig,
    run_dir: str | Path,
    *,
    loaders: Loaders | None = None,
    workers: int = 1,
    pool: StartPool | None = None,
) -> list[Row]:
    """Evaluate ``config`` in ``run_dir`` and return all rows; the same call resumes after a kill.

    ``workers`` processes make the same rows, each with models of its own; ``loaders`` must be picklable then. ``pool``
    starts them elsewhere: `codefend.integrations.ray.ray_pool` on a Ray cluster that shares the run folder.

    A ``TransferConfig`` fills a folder with one run for each pair of victims, a ``SeedsConfig`` with one for each seed.
    ``loaders`` replaces the look-up of victims, tasks and purifiers by name, for your own objects.
    Raises CodefendError for unknown names, a setting out of range, or a folder made with another config.

    >>> import tempfile, torch
    >>> from codefend import EvalConfig, Example, Task, evaluate
    >>> from codefend.bench.setup import Loaders
    >>> class Brightness:
    ...     name = "brightness"
    ...     def generate(self, images, prompts):
    ...         return ["bright" if image.mean() > 0.5 else "dark" for image in images]
    >>> def correct(answers, examples):
    ...     return torch.tensor([float(a in e.references) for a, e in zip(answers, examples)])
    >>> black = Example("1", torch.zeros(3, 32, 32), "Bright or dark?", ("dark",))
    >>> task = Task("brightness", [black], {"accuracy": correct}, headline="accuracy")
    >>> loaders = Loaders(victim=lambda name: Brightness(), task=lambda name, split, limit: task)
    >>> config = EvalConfig(tasks=("brightness",), defenses=("none", "jpeg"), attacks=("square-text",), steps=3)
    >>> rows = evaluate(config, tempfile.mkdtemp(), loaders=loaders)
    >>> attacked = [row for row in rows if row["attack"] == "square-text"]
    >>> [(row["defense"], row["threat"], row["scores"]["accuracy"]) for row in attacked]
    [('none', 'T0', 1.0), ('jpeg', 'T0', 1.0), ('jpeg', 'T2', 1.0)]
    """
    if pool is not None and isinstance(config, TransferConfig | SeedsConfig):
        raise CodefendError("a matrix or a run of several seeds stays on one machine; evaluate its runs on the cluster")
    if isinstance(config, TransferConfig):
        from codefend.bench.transfer import run_matrix

        return run_matrix(config, run_dir, loaders, workers)
    if isinstance(config, SeedsConfig):
        from codefend.bench.seeds import run_seeds

        return run_seeds(config, run_dir, loaders, workers)
    from codefend.bench.grid import run_grid

    return run_grid(config, run_dir, loaders, workers=workers, pool=pool)
