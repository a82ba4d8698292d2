"""A victim of a few parameters and purifiers with known faults, so that whole evaluations run in seconds.

The victim reads the colour of the left and of the right half of an image. Clean colours are far apart, but two
patterns that no clean image holds (a checkerboard and vertical stripes) have a large effect on it, which an attacker
at 8/255 exploits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from codefend.bench.setup import Loaders
from codefend.purifiers.base import Purifier
from codefend.tasks.metrics import VQA_METRICS, all_tags, cider_d
from codefend.types import CodefendError, Example, Task
from purifiers_kit import PlainPurifier

SIDE = 16
COLOURS = {"red": (0.8, 0.3, 0.3), "green": (0.3, 0.8, 0.3), "blue": (0.3, 0.3, 0.8)}
WORDS = list(COLOURS)
TARGET = "blue and blue"


def checkerboard(like: Tensor) -> Tensor:
    rows, columns = torch.arange(like.shape[-2]), torch.arange(like.shape[-1])
    return ((rows[:, None] + columns) % 2 * 2 - 1).to(like)


def stripes(like: Tensor) -> Tensor:
    return (torch.arange(like.shape[-1]) % 2 * 2 - 1).to(like).expand(like.shape[-2:])


class ToyVictim:
    """Answers a colour word to "left?" and "right?", both words with "and" to anything else."""

    name, greedy = "toy", True

    def __init__(self, *, checker: float = 200.0, striped: float = 0.0) -> None:
        self.checker, self.striped = checker, striped
        self.calls = 0

    def features(self, images: Tensor) -> Tensor:
        """Two tokens ``[B, 2, 3]``: colour of each half, disturbed by the patterns."""
        halves = torch.stack(images.chunk(2, dim=-1), dim=1)  # [B, 2, 3, H, W/2]
        colour = halves.mean((-2, -1)) * 10
        noise = self.checker * (halves * checkerboard(halves)).mean((-2, -1))
        return colour + noise + self.striped * (halves * stripes(halves)).mean((-2, -1))

    def logits(self, images: Tensor) -> Tensor:
        return self.features(images) @ torch.tensor([COLOURS[w] for w in WORDS]).T.to(images)  # [B, 2, 3]

    def loss(self, images: Tensor, prompts: Sequence[str], targets: Sequence[str]) -> Tensor:
        logs = self.logits(images).log_softmax(-1)
        losses = []
        for i, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
            words = [WORDS.index(w) for w in target.split() if w in WORDS]
            places = [0] if "left" in prompt else [1] if "right" in prompt else [0, 1]
            losses.append(-torch.stack([logs[i, p, w] for p, w in zip(places, words, strict=False)]).mean())
        return torch.stack(losses)

    def margins(self, images: Tensor, prompts: Sequence[str], targets: Sequence[str]) -> list[Tensor]:
        logits, margins = self.logits(images), []
        for i, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
            words = [WORDS.index(w) for w in target.split() if w in WORDS]
            places = [0] if "left" in prompt else [1] if "right" in prompt else [0, 1]
            own = torch.tensor(words[: len(places)])
            rows = logits[i, places[: len(own)]]
            others = rows.scatter(1, own[:, None], -torch.inf).amax(1)
            margins.append(rows.gather(1, own[:, None])[:, 0] - others)
        return margins

    def generate(self, images: Tensor, prompts: Sequence[str]) -> list[str]:
        self.calls += 1
        answers = []
        for prompt, (left, right) in zip(prompts, self.logits(images).argmax(-1).tolist(), strict=True):
            both = f"{WORDS[left]} and {WORDS[right]}"
            answers.append(WORDS[left] if "left" in prompt else WORDS[right] if "right" in prompt else both)
        return answers


class BlackBox:
    """Answers text only."""

    name = "black-box"

    def generate(self, images: Tensor, prompts: Sequence[str]) -> list[str]:
        return ["red"] * len(prompts)


class Smooth(PlainPurifier):
    """Averages 2x2 blocks: no pattern survives, so nothing within the budget can hurt."""

    def forward(self, images: Tensor, *, generator: Generator | None = None) -> Tensor:
        return F.interpolate(F.avg_pool2d(images, 2), scale_factor=2)


class Leaky(Smooth):
    """Stops the checkerboard but turns rows of stripes into one: not robust to an adaptive attack."""

    evaluations = 1

    def forward(self, images: Tensor, *, generator: Generator | None = None) -> Tensor:
        rows = (torch.arange(images.shape[-2]) % 2 * 2 - 1).to(images)[:, None]
        leak = (images * rows).mean((-2, -1), keepdim=True) * checkerboard(images)
        return (super().forward(images) + leak).clamp(0, 1)


class Jitter(PlainPurifier):
    """Adds noise: randomized, but no defense."""

    def __init__(self, sigma: float = 0.02) -> None:
        super().__init__()
        self.sigma = sigma

    def forward(self, images: Tensor, *, generator: Generator | None = None) -> Tensor:
        return images + self.sigma * torch.randn(images.shape, generator=generator)


class Noise(PlainPurifier):
    """Adds noise that certificates know of, and does nothing else."""

    stochastic = True

    def __init__(self, sigma: float = 0.25) -> None:
        super().__init__()
        self.noise = sigma

    def forward(self, images: Tensor, *, generator: Generator | None = None) -> Tensor:
        return images + self.noise * torch.randn(images.shape, generator=generator) if self.noise else images


class Quantize(PlainPurifier):
    """Rounds to few levels: removes small perturbations, and every gradient but a vanishing one."""

    def __init__(self, levels: int = 4) -> None:
        super().__init__()
        self.levels = levels

    def forward(self, images: Tensor, *, generator: Generator | None = None) -> Tensor:
        rounded = (images * self.levels).round() / self.levels
        return rounded.detach() + 1e-16 * images  # a trace of a gradient, so that it passes for differentiable


class Shatter(PlainPurifier):
    """Changes almost nothing; its gradient is dominated by a ripple of high frequency."""

    def forward(self, images: Tensor, *, generator: Generator | None = None) -> Tensor:
        return images + 1e-4 * torch.sin(1e6 * images)


class Rounded(PlainPurifier):
    """Eight bits, which has no gradient at all."""

    differentiable = False

    def forward(self, images: Tensor, *, generator: Generator | None = None) -> Tensor:
        return (images.detach() * 255).round() / 255


PURIFIERS: dict[str, Any] = {
    "smooth": Smooth,
    "leaky": Leaky,
    "jitter": Jitter,
    "noise": Noise,
    "quantize": Quantize,
    "shatter": Shatter,
    "rounded": Rounded,
}


def scene(index: int) -> tuple[Tensor, str, str]:
    left, right = WORDS[index % 3], WORDS[index // 3 % 3]
    image = torch.empty(3, SIDE, SIDE)
    image[:, :, : SIDE // 2] = torch.tensor(COLOURS[left])[:, None, None]
    image[:, :, SIDE // 2 :] = torch.tensor(COLOURS[right])[:, None, None]
    grain = torch.rand(image.shape, generator=torch.Generator().manual_seed(index))
    return (image + 0.02 * (grain - 0.5)).clamp(0, 1), left, right


def task(name: str, split: str = "test", limit: int | None = None) -> Task:
    """``questions`` about one half, ``captions`` of both."""
    count = 12 if limit is None else min(limit, 12)
    examples = []
    for i in range(count):
        image, left, right = scene(i)
        if name == "questions":
            side, answer = ("left", left) if i % 2 else ("right", right)
            examples.append(Example(f"q{i}", image, f"{side}?", (answer,), "colour"))
        else:
            caption = f"{left} and {right}"
            references = (caption, f"{left} beside {right}", f"there is {left} and {right}")
            examples.append(Example(f"c{i}", image, "describe", references, tags=(left, right)))
    if name == "questions":
        return Task(name, examples, dict(VQA_METRICS), "vqa_accuracy", "blue")
    if name == "captions":
        return Task(name, examples, {"all_tags": all_tags, "cider_d": cider_d}, "all_tags", TARGET)
    raise CodefendError(f"unknown task {name!r}")


def purifier(name: str, **options: Any) -> Purifier:
    if name not in PURIFIERS:
        raise CodefendError(f"unknown purifier {name!r}")
    loaded: Purifier = PURIFIERS[name](**options)
    return loaded


def loaders(victim: Any = None) -> Loaders:
    return Loaders(victim=lambda name: victim or ToyVictim(), task=task, purifier=purifier)
