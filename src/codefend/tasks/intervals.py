"""Means of per-example scores with their number, bootstrap intervals (Efron 1979, percentile method), and Wilson's."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Generator, Tensor

BLOCK = 1 << 20  # resampled numbers held at once


class MeanScore(NamedTuple):
    """The mean of the scored examples (nan if none) and how many they are."""

    mean: float
    n: int


class Interval(NamedTuple):
    """A mean with the ends of its interval and the number of examples scored."""

    mean: float
    low: float
    high: float
    n: int


def mean_score(scores: Tensor) -> MeanScore:
    """Mean over the examples that were scored (not nan), with their number."""
    scored = scores[~scores.isnan()].double()
    return MeanScore(scored.mean().item() if len(scored) else math.nan, len(scored))


def bootstrap_interval(
    scores: Tensor,
    *,
    confidence: float = 0.95,
    samples: int = 2000,
    groups: Sequence[Hashable] | None = None,
    generator: Generator | None = None,
) -> Interval:
    """Percentile bootstrap interval of the mean of ``scores`` ``[N]``, nan left out.

    ``groups`` (one key per example, say the image id) resamples whole groups: questions on one image aren't
    independent. Without ``generator`` a fresh one seeded with 0 is used, so that reports are reproducible.
    The ends are nan with fewer than two groups. Scores that are all equal give an interval of no width, which
    understates what a small sample can hide.
    """
    _check(confidence, samples)
    if groups is not None and len(groups) != len(scores):
        raise ValueError(f"groups has {len(groups)} keys for {len(scores)} scores")
    scored = ~scores.isnan()
    mean, n = mean_score(scores)
    sums, sizes = _group_sums(scores, scored, groups)
    if len(sums) < 2:
        return Interval(mean, math.nan, math.nan, n)
    generator = generator or torch.Generator().manual_seed(0)
    means = []
    for rows in _blocks(samples, len(sums)):
        picked = torch.randint(len(sums), (rows, len(sums)), generator=generator, device=generator.device).cpu()
        means.append(sums[picked].sum(1) / sizes[picked].sum(1))
    tail = (1 - confidence) / 2
    low, high = torch.cat(means).quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(mean, low, high, n)


def share_interval(successes: int, n: int, *, confidence: float = 0.95) -> Interval:
    """Wilson's interval of a share (1927), which stays wide where all or none of few examples succeed.

    >>> [round(x, 2) for x in share_interval(5, 5)]
    [1.0, 0.57, 1.0, 5]
    """
    _check(confidence, 1)
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"successes must lie between 0 and n, and n be 1 or more, not {successes} of {n}")
    z, share = NormalDist().inv_cdf((1 + confidence) / 2), successes / n
    centre = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
    low, high = ((centre + sign * half) / (1 + z * z / n) for sign in (-1, 1))
    return Interval(share, max(0.0, low), min(1.0, high), n)


def paired_difference_interval(
    scores: Tensor,
    baseline: Tensor,
    *,
    confidence: float = 0.95,
    samples: int = 2000,
    groups: Sequence[Hashable] | None = None,
    generator: Generator | None = None,
) -> Interval:
    """Interval of the mean of ``scores - baseline`` over the examples that both scored, the same examples in the same
    order; far narrower than comparing two separate intervals. Arguments as ``bootstrap_interval``."""
    if scores.shape != baseline.shape:
        raise ValueError(f"paired scores differ in shape: {tuple(scores.shape)} and {tuple(baseline.shape)}")
    return bootstrap_interval(
        scores - baseline, confidence=confidence, samples=samples, groups=groups, generator=generator
    )


def _blocks(samples: int, size: int) -> list[int]:
    """How many samples of ``size`` to draw at a time, so that memory stays bounded."""
    block = max(1, min(samples, BLOCK // size))
    return [block] * (samples // block) + [samples % block] * (samples % block > 0)


def _check(confidence: float, samples: int) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, not {confidence}")
    if samples < 1:
        raise ValueError(f"samples must be 1 or more, not {samples}")


def _group_sums(scores: Tensor, scored: Tensor, groups: Sequence[Hashable] | None) -> tuple[Tensor, Tensor]:
    """Sum and number of scored examples in each group; an example is its own group without ``groups``."""
    if groups is None:
        values = scores[scored].double().cpu()
        return values, torch.ones_like(values)
    sums: dict[Hashable, list[float]] = {}
    for key, value in zip(groups, scores.tolist(), strict=True):
        if not math.isnan(value):
            sums.setdefault(key, []).append(value)
    totals = torch.tensor([math.fsum(v) for v in sums.values()], dtype=torch.float64)
    return totals, torch.tensor([len(v) for v in sums.values()], dtype=torch.float64)
