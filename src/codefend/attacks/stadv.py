"""Spatial attack: a smooth flow moves the pixels (Xiao et al. 2018, arXiv 1801.02612)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn.functional import grid_sample, max_pool2d, pad

from codefend.attacks.base import ImageAttack, mean_gradient
from codefend.attacks.norms import Adam, choose
from codefend.types import Budget, Objective

ROUNDING = 1 / 255  # tolerance of a pixel for 8-bit and float32 rounding


def warp(images: Tensor, flow: Tensor) -> Tensor:
    """Bilinear sampling at each pixel plus its ``flow`` ``[B, 2, H, W]`` (right, down; pixels) (eq. 1)."""
    height, width = images.shape[-2:]
    rows = torch.arange(height, device=flow.device, dtype=flow.dtype).view(1, -1, 1) + flow[:, 1]
    columns = torch.arange(width, device=flow.device, dtype=flow.dtype).view(1, 1, -1) + flow[:, 0]
    span = flow.new_tensor([max(width - 1, 1), max(height - 1, 1)])
    grid = torch.stack([columns, rows], -1) * 2 / span - 1
    moved = grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=True)
    return moved.clamp(0, 1)


def roughness(flow: Tensor) -> Tensor:
    """L_flow of eq. 4, ``[B]``: length of the difference to the next pixels, as a mean over pixels.

    The paper sums; the mean keeps ``tau`` independent of the image's size.
    """
    right, down = flow[..., 1:] - flow[..., :-1], flow[..., 1:, :] - flow[..., :-1, :]
    # The epsilon keeps the gradient finite where neighbours move alike, as they do at the start.
    return sum(((d.square().sum(1) + 1e-12).sqrt().flatten(1).mean(1) for d in (right, down)), start=flow.new_zeros(()))


@dataclass(kw_only=True)
class StAdv(ImageAttack):
    """Adam on the flow of every pixel, at most ``limit`` of the shorter side each way; smoothness weighted by ``tau``.

    ``budget.norm`` and ``eps`` do not apply. Adam with a hard limit replaces the paper's L-BFGS, which has no batches
    and no bound.
    """

    limit: float = 0.02  # largest shift along either axis, share of the shorter side
    tau: float = 0.05  # weight of the flow's roughness
    rel_lr: float = 0.1  # Adam's first step, times the limit; falls linearly to 0
    name: str = "stadv"

    def perturb(self, objective: Objective, clean: Tensor, budget: Budget, generator: Generator | None) -> Tensor:
        reach = self._reach(clean)
        best = self.best_of(objective, clean, budget.eot)
        flow, adam = clean.new_zeros(len(clean), 2, *clean.shape[-2:]), Adam()

        def moved(flow: Tensor) -> Tensor:
            return objective(warp(clean, flow))

        x = clean
        for step in range(budget.steps):
            losses, grad = self.gradient(moved, flow, budget.eot, step)
            best.update(x, losses)
            smooth = mean_gradient(roughness, flow, 1)[1]
            left = 1 - step / budget.steps
            flow = (flow - self.rel_lr * reach * left * adam(grad + self.tau * smooth)).clamp(-reach, reach)
            x = warp(clean, flow)
        best.update(x, self.score(objective, x, budget.eot, budget.steps))
        return self.select(best, objective, x, budget)

    def _reach(self, images: Tensor) -> float:
        return self.limit * min(images.shape[-2:])

    def outside(self, images: Tensor, clean: Tensor) -> Tensor:
        """How far any pixel leaves the range of its neighbourhood, ``[B]``: no flow inside the limit can do that."""
        radius = int(self._reach(clean)) + 1
        padded = pad(clean, (radius,) * 4, mode="replicate")
        high = max_pool2d(padded, 2 * radius + 1, stride=1)
        low = -max_pool2d(-padded, 2 * radius + 1, stride=1)
        over = torch.maximum(images - high, low - images).flatten(1).amax(1) - ROUNDING
        return choose(over > 0, over, torch.zeros_like(over))
