"""A small evaluation on toys, and how its rows are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import toys
from codefend.bench import EvalConfig, evaluate
from codefend.core.runs import Row

SMALL = EvalConfig(
    victim="toy",
    tasks=("questions",),
    defenses=("none", "smooth", "leaky"),
    attacks=("apgd",),
    steps=12,
    batch=5,
    panels=0,
)
TIMES = {"seconds", "purify_seconds", "generate_seconds"}


def run(folder: Path, config: EvalConfig = SMALL, victim: Any = None) -> list[Row]:
    return evaluate(config, folder, loaders=toys.loaders(victim))


def untimed(rows: list[Row]) -> list[Row]:
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def mean(rows: list[Row], field: str = "scores", **where: object) -> float:
    chosen = [row for row in rows if all(row[key] == value for key, value in where.items())]
    assert chosen
    return sum(row[field][row["headline"]] for row in chosen) / len(chosen)
