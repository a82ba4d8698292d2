"""One training in several processes, as ``accelerate launch`` starts them, with the same curve as in one.

A step is a fixed number of micro-batches, each with its own pictures and noise, both functions of its number alone.
Whoever computes them, their gradients are summed before the one step that follows: one process does all of them in
turn (gradient accumulation), several share them out. Only rounding differs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from codefend.core.runs import Run, open_run, progress
from codefend.types import CodefendError

Batch = TypeVar("Batch")


class Onlooker:
    """Stands where a run folder does, in the processes that must not write."""

    def __init__(self, folder: Path) -> None:
        self.dir = folder

    def append(self, row: Mapping[str, Any]) -> bool:
        return False


class Workers:
    """``count`` processes, of which this is number ``rank``, that share the ``micro`` batches of each step."""

    def __init__(self, micro: int, *, rank: int = 0, count: int = 1) -> None:
        """Raises CodefendError when the batches cannot be shared out evenly."""
        if micro < 1 or micro % count:
            raise CodefendError(
                f"a step of micro={micro} batches cannot be shared by {count} processes: set a multiple"
            )
        self.micro, self.rank, self.count = micro, rank, count

    @classmethod
    def join(cls, micro: int) -> Workers:
        """This process among those of its launcher; alone without one. Call it before anything is put on a device."""
        count = int(os.environ.get("WORLD_SIZE", "1"))
        if count == 1:
            return cls(micro)
        from accelerate import PartialState

        from codefend.core.devices import default_device

        state = PartialState(cpu=default_device().type == "cpu")
        return cls(micro, rank=state.process_index, count=state.num_processes)

    @property
    def main(self) -> bool:
        return self.rank == 0

    def open_run(self, folder: str | Path, config: Any) -> Run | Onlooker:
        """The run folder, which only the first process holds and writes; the others go on when it is there."""
        run = open_run(folder, config) if self.main else Onlooker(Path(folder))
        self.wait()
        return run

    def wait(self) -> None:
        if self.count > 1:
            torch.distributed.barrier()

    def share(self, make: Callable[[int], Batch], step: int) -> list[tuple[int, Batch]]:
        """This process's micro-batches of a step with their numbers, which count on from step to step."""
        numbers = range(step * self.micro + self.rank, (step + 1) * self.micro, self.count)
        return [(number, make(number)) for number in numbers]

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Add up every process's gradients, in place."""
        if self.count == 1:
            return
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([grad.flatten() for grad in grads])
        torch.distributed.all_reduce(flat)
        for parameter, grad, part in zip(parameters, grads, flat.split([g.numel() for g in grads]), strict=True):
            parameter.grad = part.view_as(grad)

    def mean_terms(self, terms: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
        """Each term's mean over the micro-batches of all processes; all have the same terms."""
        flat = torch.stack([torch.stack([row[name].detach().float() for name in terms[0]]) for row in terms]).sum(0)
        if self.count > 1:
            torch.distributed.all_reduce(flat)
        return dict(zip(terms[0], (flat / self.micro).tolist(), strict=True))

    @contextmanager
    def progress(self, label: str, total: int, *, done: int = 0) -> Iterator[Callable[..., None]]:
        """`runs.progress` in the first process, silence in the others."""
        if not self.main:
            yield lambda steps=1, note="": None
            return
        with progress(label, total, done=done) as advance:
            yield advance
