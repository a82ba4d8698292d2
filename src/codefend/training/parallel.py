"""The processes of one training, as ``accelerate launch`` starts them, with the same curve as in one process.

A step has a fixed number of micro-batches, each with its own images and noise, both functions of its number alone.
Their gradients are summed before the optimizer's step, whichever process computed them: one process computes all of
them in turn (gradient accumulation), several share them. Only rounding differs.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from codefend.types import CodefendError


class Processes:
    """``count`` processes, of which this is number ``rank``."""

    def __init__(self, *, rank: int = 0, count: int = 1, state: Any = None) -> None:
        """``state``: accelerate's ``PartialState``; only several processes need one."""
        self.rank, self.count, self._state = rank, count, state

    @classmethod
    def join(cls) -> Processes:
        """This process among those of its launcher, or a single one. Call it before anything is put on a device."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        from accelerate import PartialState

        from codefend.core.devices import default_device

        state = PartialState(cpu=default_device().type == "cpu")
        return cls(rank=state.process_index, count=state.num_processes, state=state)

    @property
    def main(self) -> bool:
        """Whether this is the process that writes the run folder."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait for all processes."""
        if self._state is not None:
            self._state.wait_for_everyone()

    def check_micro(self, micro: int) -> None:
        """Raise CodefendError when ``micro`` batches a step cannot be shared evenly."""
        if micro < 1 or micro % self.count:
            raise CodefendError(
                f"a step of micro={micro} batches cannot be shared by {self.count} processes: set a multiple"
            )

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor summed over all processes."""
        if self._state is None:
            return tensor
        from accelerate.utils import reduce

        total: Tensor = reduce(tensor, "sum")
        return total

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sum every parameter's gradient over all processes, in place; one message for all of them."""
        if self._state is None:
            return
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = self.sum(torch.cat([grad.flatten() for grad in grads]))
        for parameter, grad, part in zip(parameters, grads, flat.split([g.numel() for g in grads]), strict=True):
            parameter.grad = part.view_as(grad)
