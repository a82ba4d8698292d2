"""What every training loop shares: schedule, moving average, one checkpoint file that resumes everything."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from codefend.core.runs import load_checkpoint, save_checkpoint

Parameters = Mapping[str, nn.Parameter]


def cosine_rate(step: int, steps: int, *, warmup: int, floor: float = 0.02) -> float:
    """Factor of the learning rate: linear warm-up, then a half cosine down to ``floor``."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Scale each group's ``base`` learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["base"] * rate


def descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> float:
    """One step down a scalar loss, the gradient clipped to norm 1; returns its norm before that."""
    optimizer.zero_grad()
    loss.backward()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    return float(norm)


class Average:
    """Exponential moving average of parameters, with the usual short memory at the start."""

    def __init__(self, parameters: Parameters, decay: float = 0.998) -> None:
        self.decay, self.updates = decay, 0
        self.values: dict[str, Tensor] = {name: value.detach().clone() for name, value in parameters.items()}

    def update(self, parameters: Parameters) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, value in parameters.items():
            self.values[name].lerp_(value.detach(), 1 - decay)


def save_training(
    path: Path, parameters: Parameters, optimizer: torch.optim.Optimizer, step: int, average: Average | None = None
) -> None:
    """Write parameters, moments and average as one atomic file."""
    tensors: dict[str, Tensor] = {f"net/{name}": value.detach() for name, value in parameters.items()}
    if average is not None:
        tensors |= {f"average/{name}": value for name, value in average.values.items()}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}/{name}"] = torch.as_tensor(value)
    save_checkpoint(path, tensors, {"step": step, "updates": 0 if average is None else average.updates})


def restore_training(
    path: Path, parameters: Parameters, optimizer: torch.optim.Optimizer, average: Average | None = None
) -> int:
    """Undo `save_training` and return the step to go on from; 0 when there is no file yet."""
    if not path.exists():
        return 0
    tensors, state = load_checkpoint(path)
    for name, parameter in parameters.items():
        parameter.data.copy_(tensors[f"net/{name}"])
        if f"step/{name}" in tensors:  # AdamW keeps its count on the CPU, its moments beside the parameter
            moments = {key: tensors[f"{key}/{name}"].to(parameter.device) for key in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": tensors[f"step/{name}"], **moments}
    if average is not None:
        average.values = {name: tensors[f"average/{name}"].to(p.device) for name, p in parameters.items()}
        average.updates = int(state["updates"])
    return int(state["step"])
