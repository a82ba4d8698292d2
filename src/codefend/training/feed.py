"""Batches made ahead of the training that eats them, each a pure function of its step number."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

Batch = TypeVar("Batch")


class _Steps(Dataset[Batch], Generic[Batch]):
    def __init__(self, make: Callable[[int], Batch]) -> None:
        self.make = make

    def __getitem__(self, step: int) -> Batch:
        return self.make(step)


def feed(make: Callable[[int], Batch], start: int, stop: int, device: torch.device) -> Iterator[Batch]:
    """``make(start), ..., make(stop - 1)`` in order, whoever makes them: a resumed training sees the same batches.

    A GPU would wait for scenes to be drawn, so worker processes draw them ahead; training on the CPU has no core to
    spare, and draws each when it is wanted.
    """
    workers = 0 if device.type == "cpu" else max(1, min(12, (os.cpu_count() or 2) - 2))
    steps: range = range(start, stop)
    yield from DataLoader(_Steps(make), batch_size=None, sampler=steps, num_workers=workers)
