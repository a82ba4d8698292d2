"""Shared parts of the trainings of learned policies: batches of items, the schedule, and the rows of the run folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from codefend.core.progress import progress
from codefend.core.runs import Row
from codefend.core.seeds import make_generator
from codefend.prompts.items import Item
from codefend.training.fit import CHECKPOINT_FILE, Training, cosine_rate, optimize, restore_training

Batch = TypeVar("Batch")


def train_policy(training: Training[Batch], folder: Path, label: str, append: Callable[[Row], object]) -> None:
    """Run ``training`` from its checkpoint in ``folder`` on; ``append`` receives a row for each step."""
    checkpoint = folder / CHECKPOINT_FILE
    start = restore_training(checkpoint, training)
    with progress(label, training.steps, done=start) as advance:
        for step, row in optimize(training, checkpoint, start=start):
            append({"key": f"step-{step}", "kind": "step", "step": step, **row})
            advance(1, f"loss {row['loss']:.3f}")


def policy_schedule(optimizer: Optimizer, steps: int, warmup: int) -> LambdaLR:
    """Linear warm-up, then a half cosine down to a tenth."""
    return LambdaLR(optimizer, partial(cosine_rate, steps=steps, warmup=warmup, floor=0.1))


def draw_items(items: Sequence[Item], count: int, clean_share: float, seed: int, step: int) -> list[Item]:
    """The items of a step, with images of one size and a share of clean ones; depends on seed and step alone."""
    generator = make_generator(seed, "batch", step)

    def choose(pool: Sequence[Item]) -> Item:
        return pool[int(torch.randint(len(pool), (1,), generator=generator))]

    size = choose(items).image.shape
    same_size = [item for item in items if item.image.shape == size]
    clean = [item for item in same_size if item.group == "clean"]
    others = [item for item in same_size if item.group != "clean"]
    batch = []
    for _ in range(count):
        is_clean = bool(torch.rand(1, generator=generator) < clean_share)
        batch.append(choose((clean if is_clean else others) or same_size))
    return batch
