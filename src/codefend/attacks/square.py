"""Square attack: score-only random search with square-shaped updates (Andriushchenko et al. 2020, arXiv 1912.00049)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from codefend.attacks.base import ImageAttack
from codefend.attacks.norms import direction, length, project, random_signs, uniform
from codefend.types import Budget, Objective

_SCHEDULE = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # halvings of p, in queries of 10,000 (the authors' code)


def pyramid(side: int, like: Tensor) -> Tensor:
    """Algorithm 3's update of the l2 attack: two stacked pyramids of opposite sign, ``[side, side]``, unit l2 norm."""

    def half(rows: int, columns: int) -> Tensor:
        # eta_rs = sum_{k=0}^{M(r,s)} 1 / (n + 1 - k)^2 with n = floor(longer side / 2): rings.
        n = max(rows, columns) // 2
        r = (torch.arange(1, rows + 1) - rows // 2 - 1).abs().view(-1, 1)
        s = (torch.arange(1, columns + 1) - columns // 2 - 1).abs().view(1, -1)
        ring = n - torch.maximum(r, s)  # M(r, s); negative outside the pyramid
        weights = (1.0 / torch.arange(n + 1, 0, -1).square()).cumsum(0)  # indexed by M
        return torch.where(ring >= 0, weights[ring.clamp_min(0)], torch.zeros(()))

    top = side // 2
    eta = torch.cat([half(top, side), -half(side - top, side)]).to(like)
    unit: Tensor = eta / eta.norm()
    return unit


@dataclass(kw_only=True)
class SquareAttack(ImageAttack):
    """Random search that keeps improvements of the objective; ``budget.steps`` is the number of queries per image."""

    p_init: float = 0.8  # share of the pixels in the first square (AutoAttack's; the paper has 0.05 l-inf, 0.1 l2)
    name: str = "square"

    def perturb(self, objective: Objective, clean: Tensor, budget: Budget, generator: Generator | None) -> Tensor:
        best = self.best_of(objective, clean, budget.eot)
        # The search continues from its own start even where the clean image still scores lower.
        walk = self.best_of(objective, self._start(clean, budget, generator), budget.eot, 0)
        for query in range(1, budget.steps):
            p = self.p_init / 2 ** sum(query * 10_000 // budget.steps > mark for mark in _SCHEDULE)
            move = _move_linf if budget.norm == "linf" else _move_l2
            trial = move(walk.images, clean, p, budget, generator)
            walk.update(trial, self.score(objective, trial, budget.eot, query))
        best.update(walk.images, walk.losses)
        return self.select(best, objective, walk.images, budget)

    def _start(self, clean: Tensor, budget: Budget, generator: Generator | None) -> Tensor:
        batch, channels, height, width = clean.shape
        if budget.norm == "linf":  # vertical stripes of +-eps
            stripes = random_signs(clean, generator, shape=(batch, channels, 1, width))
            return project(clean + budget.eps * stripes, clean, budget)
        side = max(min(height, width) // 5, 2)
        rows, columns = height // side, width // side
        tiles = pyramid(side, clean).repeat(rows, columns)
        signs = random_signs(clean, generator, shape=(batch, channels, rows, columns))
        delta = torch.zeros_like(clean)
        signs = signs.repeat_interleave(side, 2).repeat_interleave(side, 3)
        delta[:, :, : rows * side, : columns * side] = tiles * signs
        return project(clean + budget.eps * direction(delta, "l2"), clean, budget)


def _corners(like: Tensor, side: int, generator: Generator | None) -> tuple[Tensor, Tensor]:
    """Row and column indices ``[B, side]`` of one random window per example."""
    height, width = like.shape[-2:]
    draws = uniform(like, generator, shape=(2, len(like))).double()
    reach = torch.arange(side, device=like.device)
    top, left = (draws[0] * (height - side + 1)).long(), (draws[1] * (width - side + 1)).long()
    return top.unsqueeze(1) + reach, left.unsqueeze(1) + reach


def _window(like: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """1 inside each example's window, else 0: ``[B, 1, H, W]``."""
    in_rows = torch.zeros(len(like), like.shape[-2], dtype=like.dtype, device=like.device).scatter(1, rows, 1.0)
    in_columns = torch.zeros(len(like), like.shape[-1], dtype=like.dtype, device=like.device).scatter(1, columns, 1.0)
    return (in_rows.unsqueeze(2) * in_columns.unsqueeze(1)).unsqueeze(1)


def _move_linf(images: Tensor, clean: Tensor, p: float, budget: Budget, generator: Generator | None) -> Tensor:
    """Algorithm 2: one square takes clean +-eps, one sign per channel."""
    height, width = images.shape[-2:]
    side = min(max(round((p * height * width) ** 0.5), 1), height, width)
    mask = _window(images, *_corners(images, side, generator))
    signs = random_signs(images, generator, shape=(*images.shape[:2], 1, 1))
    return project(torch.where(mask > 0, clean + budget.eps * signs, images), clean, budget)


def _move_l2(images: Tensor, clean: Tensor, p: float, budget: Budget, generator: Generator | None) -> Tensor:
    """Algorithm 4: one window gives up its share of the squared norm, which a pyramid in another one takes over."""
    batch, channels, height, width = images.shape
    side = max(round((p * height * width) ** 0.5), 3)
    side = min(side + 1 - side % 2, height, width)
    delta = images - clean
    new, old = _corners(images, side, generator), _corners(images, side, generator)
    new_mask, old_mask = _window(images, *new), _window(images, *old)
    unused = (budget.eps**2 - length(delta, "l2") ** 2).clamp_min(0) / channels
    share = (delta * torch.maximum(new_mask, old_mask)).square().sum((2, 3)) + unused.unsqueeze(1)  # [B, C]
    signs = random_signs(images, generator, shape=(batch, channels, 1, 1))
    eta = pyramid(side, images)
    if float(uniform(images, generator, shape=(1,))) < 0.5:
        eta = eta.T
    pick = (
        torch.arange(batch, device=images.device).view(-1, 1, 1, 1),
        torch.arange(channels, device=images.device).view(1, -1, 1, 1),
        new[0].view(batch, 1, side, 1),
        new[1].view(batch, 1, 1, side),
    )
    window = delta[pick]
    norm = window.square().sum((2, 3), keepdim=True).sqrt().clamp_min(1e-12)
    patch = signs * eta + window / norm
    patch = patch / patch.square().sum((2, 3), keepdim=True).sqrt().clamp_min(1e-12)
    delta = delta * (1 - old_mask)
    delta[pick] = patch * share.sqrt().view(batch, channels, 1, 1)
    return project(clean + budget.eps * direction(delta, "l2"), clean, budget)
