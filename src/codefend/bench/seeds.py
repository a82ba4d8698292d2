"""One evaluation with several seeds: a run for each, which resumes by itself, and the scores of examples over all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from codefend.bench.config import EvalConfig, SeedsConfig, check
from codefend.bench.grid import run_grid
from codefend.bench.results import CLEAN, TAIL_SAMPLES, Group, group_rows, score, worst_rows
from codefend.bench.setup import Loaders
from codefend.core.runs import Row, open_run
from codefend.tasks.intervals import Interval, bootstrap_interval


def runs(config: SeedsConfig) -> Iterator[tuple[str, EvalConfig]]:
    """Folder and config of the run of each seed."""
    shared = {field.name: getattr(config, field.name) for field in fields(EvalConfig)}
    for seed in config.seeds:
        yield f"seed-{seed}", EvalConfig(**{**shared, "seed": seed})


def run_seeds(config: SeedsConfig, run_dir: str | Path, loaders: Loaders | None = None, workers: int = 1) -> list[Row]:
    """Fill the run of every seed and return all rows; the same call resumes. Raises CodefendError as ``evaluate``."""
    check(config)
    loaders = loaders or Loaders()
    if workers == 1:
        loaders = replace(loaders, victim=cache(loaders.victim))  # loading one takes seconds
    rows: list[Row] = []
    with open_run(run_dir, config.recorded()):
        for name, single in runs(config):
            rows += [
                {**row, "seed": single.seed} for row in run_grid(single, Path(run_dir) / name, loaders, workers=workers)
            ]
    return rows


@dataclass(frozen=True)
class SeedMeans:
    """Scores of one figure: per example the mean over seeds; ``images`` identifies those that questions share."""

    group: Group
    scores: dict[str, float]
    images: dict[str, str]
    seeds: int  # the fewest of any example

    def interval(self) -> Interval:
        """Mean with its 95% bootstrap interval over images."""
        values = torch.tensor(list(self.scores.values()), dtype=torch.float64)
        return bootstrap_interval(values, groups=[self.images[name] for name in self.scores])

    def less(self, other: SeedMeans, *, confidence: float) -> Interval:
        """Interval of the mean of this minus ``other``, paired over the examples of both."""
        common = [name for name in self.scores if name in other.scores]
        gaps = torch.tensor([self.scores[name] - other.scores[name] for name in common], dtype=torch.float64)
        groups = [self.images[name] for name in common]
        return bootstrap_interval(gaps, confidence=confidence, samples=TAIL_SAMPLES, groups=groups)


def seed_means(rows: Sequence[Row]) -> list[SeedMeans]:
    """Clean figures and, for each threat and eps, the worst case over attacks; rows carry their ``seed``."""
    by_group: dict[Group, dict[str, list[float]]] = {}
    images: dict[str, str] = {}
    for seed in dict.fromkeys(row["seed"] for row in rows):
        groups = group_rows(row for row in rows if row["seed"] == seed)
        clean = {group: members for group, members in groups.items() if group.attack == CLEAN}
        for group, members in {**clean, **worst_rows(groups)}.items():
            field = "mean_scores" if group.attack == CLEAN else "worst_scores"
            for row in members:
                by_group.setdefault(group, {}).setdefault(row["example"], []).append(score(row, field=field))
                images[row["example"]] = row["image"]
    return [_means(group, members, images) for group, members in by_group.items()]


def _means(group: Group, members: dict[str, list[float]], images: dict[str, str]) -> SeedMeans:
    means: dict[str, Tensor] = {name: torch.tensor(values).nanmean() for name, values in members.items()}
    scores = {name: float(mean) for name, mean in means.items()}
    return SeedMeans(group, scores, {name: images[name] for name in scores}, min(map(len, members.values())))
