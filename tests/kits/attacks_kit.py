"""A small victim, purifiers to put before it, and images with saturated pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d, cross_entropy, normalize

from codefend.attacks import AttackSpec
from codefend.attacks.objectives import objective_for, untargeted
from codefend.defense import DefendedVictim, Defense
from codefend.types import Budget, Objective, Victim
from purifiers_kit import PlainPurifier


class ToyVictim:
    """A random conv net with one of eight letters in mind; the length of a text selects its letter.

    Its answers are longer: that letter, then one of two characters for each of 48 features.
    """

    name = "toy"
    vocabulary = ("a", "bb", "ccc", "dddd", "eeeee")
    classes = ("ant", "big ant", "cat", "dog", "eel", "fox", "gnu", "hen")

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.kernel = torch.randn(12, 3, 4, 4, generator=generator) / 4
        self.head = torch.randn(12, 8, generator=generator) * 3

    def features(self, images: Tensor) -> Tensor:
        return torch.tanh(conv2d(images - 0.5, self.kernel.to(images), stride=4)).flatten(2).transpose(1, 2)

    def logits(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        shift = torch.tensor([len(p) % 3 for p in prompts]).view(-1, 1) / 3
        return torch.tanh(self.features(images).mean(1) * 4 + shift) @ self.head.to(images)

    def loss(self, images: Tensor, prompts: Sequence[str], targets: Sequence[str]) -> Tensor:
        labels = torch.tensor([len(t) % 8 for t in targets])
        return cross_entropy(self.logits(images, prompts), labels, reduction="none")

    def margins(self, images: Tensor, prompts: Sequence[str], targets: Sequence[str]) -> list[Tensor]:
        logits = self.logits(images, prompts)
        margins = []
        for row, target in zip(logits, targets, strict=True):
            others = torch.ones(8, dtype=torch.bool).scatter(0, torch.tensor(len(target) % 8), False)
            margins.append((row[len(target) % 8] - row[others].max()).expand(2) / 20)
        return margins

    def word_scores(self, images: Tensor, words: Sequence[str]) -> Tensor:
        table = torch.stack([torch.sin(torch.arange(12) * (len(word) + 1.0)) for word in words]).to(images)
        return normalize(self.features(images), dim=-1) @ normalize(table, dim=-1).T

    def class_scores(self, images: Tensor) -> Tensor:
        return 2 * self.logits(images, [""] * len(images))

    def generate(self, images: Tensor, prompts: Sequence[str]) -> list[str]:
        letters = ["abcdefgh"[i] for i in self.logits(images, prompts).argmax(1).tolist()]
        signs = (self.features(images)[:, ::4].flatten(1) > 0).int()
        marks = (signs + 2 * torch.arange(signs.shape[1]) + ord("一")).tolist()
        return [a + "".join(map(chr, row)) for a, row in zip(letters, marks, strict=True)]


class CallCounter:
    """An objective that counts its evaluations: ``calls``, each of one batch."""

    def __init__(self, objective: Objective) -> None:
        self.objective, self.calls = objective, 0

    def __call__(self, images: Tensor) -> Tensor:
        self.calls += 1
        return self.objective(images)


class Dim(PlainPurifier):
    """A differentiable, deterministic purifier."""

    def forward(self, images: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        return 0.1 + 0.8 * images


class Noisy(PlainPurifier):
    """A differentiable, randomized purifier."""

    def __init__(self, sigma: float = 0.1) -> None:
        super().__init__()
        self.sigma = sigma

    def forward(self, images: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        return images + self.sigma * torch.randn(images.shape, generator=generator)


PROMPTS = ["what?", "describe", "how many?"]
ANSWERS = ["a", "bb", "ccc"]


def sample_images(batch: int = 3, size: int = 16, seed: int = 1) -> Tensor:
    """8-bit images with saturated pixels in them, as flat backgrounds have."""
    noise = torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))
    return ((noise * 1.4 - 0.2).clamp(0, 1) * 255).round() / 255


BUDGETS = {"linf": Budget("linf", 8 / 255, 12), "l2": Budget("l2", 0.5, 12)}
both_norms = pytest.mark.parametrize("norm", BUDGETS)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


VICTIMS: dict[str, Callable[[], Victim]] = {
    "bare": ToyVictim,
    "defended": lambda: DefendedVictim(ToyVictim(), Defense(purifier=Dim(), policy=lambda p: p + "!", name="dim")),
}


def make_objective(spec: AttackSpec, victim: Victim, clean: Tensor) -> Objective:
    answers, target = list(ANSWERS), ["target"] * 3
    if spec.goal.startswith("answer"):  # its answers to the clean and to other images
        answers, target = victim.generate(clean, PROMPTS), victim.generate(sample_images(seed=2), PROMPTS)
    return objective_for(spec, victim, PROMPTS, answers, target, clean, sample_images(seed=2))


def setup(spec: AttackSpec, victim: str = "bare", images: Tensor | None = None) -> tuple[Objective, Tensor]:
    clean = sample_images() if images is None else images
    return make_objective(spec, VICTIMS[victim](), clean), clean


def objective_of(victim: ToyVictim | None = None) -> Objective:
    return untargeted(victim or ToyVictim(), PROMPTS, ANSWERS)


QUESTIONS = ["What is left of the picture?", "Describe the image.", "How many red objects are there?"]


class PromptReader(ToyVictim):
    """Its logits shift with every character of the prompt and its place."""

    def logits(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        shift = torch.tensor([[sum(ord(c) * (i + 1) for i, c in enumerate(p)) % 97 / 97.0] for p in prompts])
        return torch.tanh(self.features(images).mean(1) * 4 + shift) @ self.head.to(images)


def levenshtein(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]
