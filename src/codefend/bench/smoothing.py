"""Certified answers: randomized smoothing with the purifier as its denoiser.

Cohen et al. 2019 (arXiv 1902.02918, theorem 1 and sec. 3.2.2); Carlini et al. 2023 (arXiv 2206.10550): denoise, then
classify; Seferis et al. 2025 (arXiv 2509.16088): the answers of a model that writes text are the classes.

What a certificate says. Let f(x) be a statement about the victim's answer to the purified image x, such as "it is
'red'", and g(x) the statement that f makes most often about x + sigma n, n ~ N(0, I). With probability 1 - alpha over
the draws, g(x + d) = g(x) for every change d of l2 norm below the radius. It holds for g, the answer by a vote over
many draws, and not for a single answer. Its conditions, which `SmoothedVictim` checks: the noise is added to the image
before all else, and the rest is a function of the noisy image, so gate and guidance see nothing but the noisy image and
the victim decodes greedily. It is a statement about real numbers: float32 sums, and kernels whose rounding depends on
the batch, deviate from them, and noise of limited precision can be exploited on purpose (Jin et al. 2022, arXiv
2205.10159; Voracek & Hein 2023, arXiv 2207.07209).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

import torch
from torch import Generator, Tensor

from codefend.core.devices import default_device, mixed_precision
from codefend.core.seeds import noise_like
from codefend.defense import Defense
from codefend.prompts.policy import attach
from codefend.tasks.metrics import holds_phrase, normalize_answer
from codefend.types import AnswersGreedily, CodefendError, Victim

Statement = Callable[[str], str]  # what an answer says: one class of finitely or countably many
TOLERANCE = 1e-4  # between two evaluations of one noisy batch: what kernels may differ by


@dataclass(frozen=True)
class Certificate:
    """``says`` holds for the smoothed victim at every image closer than ``radius`` (l2, pixels in [0, 1]).

    ``radius`` is 0 where the certificate abstains: then nothing is certain, not even ``says`` for the image itself.
    ``hits`` of ``draws`` answers gave ``says``; its probability is at least ``lower`` with confidence 1 - alpha.
    """

    says: str
    radius: float
    hits: int
    draws: int
    lower: float

    @property
    def abstains(self) -> bool:
        return self.radius == 0


class SmoothedVictim:
    """A victim behind a purifier, as a function of noisy images.

    Raises CodefendError when a certificate's conditions do not hold: a purifier without noise, or with more noise than
    the first; a victim that does not declare greedy answers. ``mixed``: the victim runs in `mixed_precision`, and what
    holds is said of the victim in that precision.
    """

    def __init__(self, victim: Victim, defense: Defense, *, mixed: bool = False) -> None:
        if not (isinstance(victim, AnswersGreedily) and victim.greedy):
            raise CodefendError(
                f"victim {victim.name!r} does not declare greedy answers (greedy = True), and a certificate holds only "
                "where the answer is a function of the noisy image"
            )
        if defense.votes > 1:
            raise CodefendError(f"{defense.name}: a certificate counts draws itself; name the defense without votes")
        if defense.purifier is None:
            raise CodefendError("a certificate needs noise: use a defense that adds it, such as bridge:sigma=0.1")
        self.victim, self.defense = attach(victim, defense.policy), defense
        self.sigma, self.purifier = defense.purifier.noise, defense.purifier.behind_noise()
        if self.purifier.stochastic:
            raise CodefendError(
                f"purifier {defense.name} draws noise again after the first, so that its certificate would not hold; "
                "use one step (steps=1) or deterministic ones (eta=0)"
            )
        self._precision = mixed_precision if mixed else lambda device: nullcontext()
        self._probed = False

    @torch.no_grad()
    def draw(self, image: Tensor, prompt: str, count: int, *, batch: int, generator: Generator | None) -> list[str]:
        """``count`` answers to ``image`` ``[3, H, W]``, each under noise of its own."""
        answers: list[str] = []
        prompts = self.defense.prompts([prompt])
        for size in [batch] * (count // batch) + [count % batch] * (count % batch > 0):
            copies = image.to(default_device()).expand(size, -1, -1, -1)
            noisy = copies + self.sigma * noise_like(copies, generator)
            purified = self.purifier(noisy)
            if not self._probed:
                self._check_repeats(noisy, purified)
            with self._precision(default_device()):
                answers += self.victim.generate(purified.to(image.device), prompts * size)
        return answers

    def _check_repeats(self, noisy: Tensor, purified: Tensor) -> None:
        if not torch.allclose(self.purifier(noisy), purified, rtol=0, atol=TOLERANCE):
            raise CodefendError(f"purifier {self.defense.name} is not deterministic after its noise: no certificate")
        self._probed = True


def certify(
    victim: Victim,
    defense: Defense,
    image: Tensor,
    prompt: str,
    *,
    samples: int = 1000,
    selection: int = 100,
    alpha: float = 0.001,
    batch: int = 50,
    generator: Generator | None = None,
) -> Certificate:
    """The smoothed victim's answer to a question about ``image`` ``[3, H, W]``, with its certified l2 radius.

    Answers that differ in case, articles or punctuation are one class. Raises CodefendError where `SmoothedVictim`
    does. A certificate is wrong with probability ``alpha`` at most.

    >>> import torch
    >>> from codefend import Defense, certify, load_purifier
    >>> class Brightness:
    ...     name, greedy = "brightness", True
    ...     def generate(self, images, prompts):
    ...         return ["bright" if image.mean() > 0.5 else "dark" for image in images]
    >>> defense = Defense(load_purifier("bridge", sigma=0.1))
    >>> certificate = certify(Brightness(), defense, torch.full((3, 32, 32), 0.9), "Bright?", samples=50, selection=5)
    >>> certificate.says, round(certificate.radius, 3)
    ('bright', 0.113)
    """
    check_draws(samples, selection, alpha, batch)
    smoothed = SmoothedVictim(victim, defense)
    answers = [smoothed.draw(image, prompt, n, batch=batch, generator=generator) for n in (selection, samples)]
    return certificates(answers[0], answers[1], {"answer": normalize_answer}, alpha, smoothed.sigma)["answer"]


def certificates(
    selection: Sequence[str], estimation: Sequence[str], statements: Mapping[str, Statement], alpha: float, sigma: float
) -> dict[str, Certificate]:
    """One certificate per statement, all of them right with probability 1 - alpha (Bonferroni, alpha / their number).

    Cohen et al.'s CERTIFY: the first answers choose what to certify, the others alone bound its probability p; the
    radius is sigma times the normal quantile of p, and there is none for p of 1/2 or less.
    """
    result = {}
    for name, says in statements.items():
        chosen = Counter(map(says, selection)).most_common(1)[0][0]
        hits = sum(says(answer) == chosen for answer in estimation)
        lower = lower_bound(hits, len(estimation), alpha / len(statements))
        radius = sigma * NormalDist().inv_cdf(lower) if lower > 0.5 else 0.0
        result[name] = Certificate(chosen, radius, hits, len(estimation), lower)
    return result


def naming(objects: Sequence[str]) -> dict[str, Statement]:
    """A binary statement per object: whether a caption names it, "yes" or "no"."""

    def names(phrase: str) -> Statement:
        return lambda answer: "yes" if holds_phrase(answer, phrase) else "no"

    return {phrase: names(phrase) for phrase in objects}


@cache
def lower_bound(hits: int, draws: int, alpha: float) -> float:
    """Clopper & Pearson's lower bound: the p at which ``hits`` or more of ``draws`` have probability ``alpha``.

    A share below it is rejected at level ``alpha``, exactly. By bisection, rounded down.
    """
    low, high = 0.0, hits / draws
    while high - low > 1e-12:
        middle = (low + high) / 2
        low, high = (middle, high) if _upper_tail(hits, draws, middle) < alpha else (low, middle)
    return low


def _upper_tail(hits: int, draws: int, p: float) -> float:
    """Probability of ``hits`` or more of ``draws``, each with probability ``p`` in (0, 1)."""
    whole = math.lgamma(draws + 1)
    logs = (
        whole - math.lgamma(k + 1) - math.lgamma(draws - k + 1) + k * math.log(p) + (draws - k) * math.log1p(-p)
        for k in range(hits, draws + 1)
    )
    return math.fsum(map(math.exp, logs))


def check_draws(samples: int, selection: int, alpha: float, batch: int) -> None:
    """Raise CodefendError for settings that cannot certify anything."""
    if not 0 < alpha < 1:
        raise CodefendError(f"alpha must be between 0 and 1, not {alpha:g}")
    for name, value in (("samples", samples), ("selection", selection), ("batch", batch)):
        if value < 1:
            raise CodefendError(f"{name} must be 1 or more, not {value}")
    if alpha ** (1 / samples) <= 0.5:
        raise CodefendError(f"{samples} samples certify nothing at alpha {alpha:g}, not even if all agree; draw more")
