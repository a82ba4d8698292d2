"""What both learned policies share: the learning rate, the batch of a step, and checkpoints of parameters with Adam."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from codefend.core.runs import load_checkpoint, make_generator, save_checkpoint
from codefend.prompts.items import Item
from codefend.types import CodefendError

Parameters = Mapping[str, nn.Parameter]


def rate(step: int, steps: int, warmup: int) -> float:
    """The share of the learning rate at ``step``: linear warm-up, then a cosine down to a tenth."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(steps - warmup, 1))


def draw(items: Sequence[Item], count: int, clean_share: float, seed: int, step: int) -> list[Item]:
    """The batch of a step: one picture size, clean items at ``clean_share``; depends on seed and step only."""
    generator = make_generator(seed, "batch", step)

    def index(pool: Sequence[Item]) -> int:
        return int(torch.randint(len(pool), (1,), generator=generator))

    size = items[index(items)].image.shape
    fitting = [item for item in items if item.image.shape == size]
    clean = [item for item in fitting if item.group == "clean"]
    other = [item for item in fitting if item.group != "clean"]
    batch = []
    for _ in range(count):
        wants_clean = bool(torch.rand(1, generator=generator) < clean_share)
        pool = (clean if wants_clean else other) or fitting
        batch.append(pool[index(pool)])
    return batch


def update(optimizer: torch.optim.Optimizer, parameters: Parameters, loss: torch.Tensor, lr: float, step: int) -> None:
    """One step of Adam with the gradient's norm cut at 1. Raises CodefendError for a loss that is not finite."""
    if not bool(torch.isfinite(loss)):
        raise CodefendError(f"the loss is not finite at step {step}; use a lower learning rate")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(parameters.values(), 1.0)
    optimizer.step()


def save_state(path: Path, parameters: Parameters, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Write parameters, moments and step as one file."""
    tensors: dict[str, torch.Tensor] = {f"value.{name}": parameter for name, parameter in parameters.items()}
    moments = optimizer.state_dict()["state"]
    for index, name in enumerate(parameters):
        for key, value in moments.get(index, {}).items():
            tensors[f"adam.{key}.{name}"] = torch.as_tensor(value)
    save_checkpoint(path, tensors, {"step": step})


def restore_state(path: Path, parameters: Parameters, optimizer: torch.optim.Optimizer) -> int:
    """Set what ``save_state`` wrote and return its step; 0 when there is no file."""
    if not path.exists():
        return 0
    tensors, state = load_checkpoint(path)
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for index, (name, parameter) in enumerate(parameters.items()):
        parameter.data.copy_(tensors[f"value.{name}"])
        for key in ("step", "exp_avg", "exp_avg_sq"):
            if f"adam.{key}.{name}" in tensors:
                moments.setdefault(index, {})[key] = tensors[f"adam.{key}.{name}"]
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(state["step"])
