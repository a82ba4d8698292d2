"""Typographic attack: text written into the image (Goh et al. 2021, "Multimodal Neurons"; FigStep, 2311.05608)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, product

import torch
from torch import Generator, Tensor

from codefend.attacks.base import PromptObjective, TextAttack
from codefend.attacks.bitmap_font import render
from codefend.types import Budget, CodefendError

_PLACES = (1.0, 0.0, 0.5)  # top of the strip, share of the free height: bottom, top, middle
_INKS = (1.0, 0.0)  # white on black, black on white
_CONTRASTS = (0.4, 0.2, 0.1, 0.05)  # of faint letters, in [0, 1]
_GAPS = (0, 2)  # empty columns behind each character, of 6 dots


def write_text(images: Tensor, text: str, *, size: float = 0.1, place: float = 1.0, ink: float = 1.0) -> Tensor:
    """``images`` ``[B, 3, H, W]`` with ``text`` on an opaque strip across the image, cut where it does not fit.

    ``size`` is a character's height as a share of the image's (at least 8 pixels), ``place`` 0 the top and 1 the
    bottom, ``ink`` the letters' grey level on a strip of the opposite one.
    """
    height, width = images.shape[-2:]
    scale = max(round(size * height / 8), 1)
    dots = render(text, (width // scale - 1) // 6).repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    dots = dots[:height, :width].to(images)
    top = int(place * (height - dots.shape[0]))
    left = (width - dots.shape[1]) // 2
    strip = images.new_full((dots.shape[0], width), 1 - ink)
    strip[:, left : left + dots.shape[1]] += (2 * ink - 1) * dots
    overlaid = images.clone()
    overlaid[:, :, top : top + dots.shape[0]] = strip
    return overlaid


@dataclass(kw_only=True)
class TypographicAttack(TextAttack):
    """Writes ``sentence`` on the image; per example the best of three places and two inks.

    ``budget`` has no effect except for its ``eot``. Prompts are left unchanged.
    """

    sentence: str = "nothing to see"
    size: float = 0.1  # height of a character, share of the image's
    name: str = "typographic"

    def __post_init__(self) -> None:
        if not 0 < self.size <= 1:
            raise CodefendError(f"size of attack {self.name!r} is a share above 0, to 1, not {self.size:g}")

    def __call__(
        self,
        objective: PromptObjective,
        images: Tensor,
        prompts: Sequence[str],
        budget: Budget,
        *,
        generator: Generator | None = None,
    ) -> tuple[Tensor, list[str]]:
        clean, of_images = images.detach(), objective(prompts)
        best, last = self.best_of(of_images, clean, budget.eot), clean
        for number, last in enumerate(self.renderings(clean, budget)):
            best.update(last, self.score(of_images, last, budget.eot, number))
        return self.select(best, of_images, last, budget), list(prompts)

    def renderings(self, clean: Tensor, budget: Budget) -> Iterator[Tensor]:
        """The candidates, each ``[B, 3, H, W]``: the sentence written on the images in different ways."""
        for place, ink in product(_PLACES, _INKS):
            yield write_text(clean, self.sentence, size=self.size, place=place, ink=ink)

    def outside(self, images: Tensor, clean: Tensor) -> Tensor:
        """0 for each image: text in the image is not bounded."""
        return torch.zeros(len(clean), dtype=clean.dtype, device=clean.device)


def write_faint(images: Tensor, text: str, *, size: float = 0.1, contrast: float = 0.1, gap: int = 0) -> Tensor:
    """``images`` ``[B, 3, H, W]`` with ``text`` all over them in letters without a strip, lighter or darker by
    ``contrast`` (below 0), clipped to [0, 1].

    ``gap`` puts spaces between the characters, so that readers of lines see single letters.
    """
    height, width = images.shape[-2:]
    scale = max(round(size * height / 8), 1)
    columns, rows = (width // scale - 1) // 6, height // (8 * scale)
    spaced = (" " * gap).join(text) if gap else text
    page = render(" ".join([spaced] * (rows * columns // max(len(spaced), 1) + 1)), columns)
    dots = page.repeat_interleave(scale, 0).repeat_interleave(scale, 1)[:height, :width].to(images)
    faint = images.clone()
    faint[:, :, : dots.shape[0], : dots.shape[1]] += contrast * dots
    return faint.clamp(0, 1)


@dataclass(kw_only=True)
class FaintTextAttack(TypographicAttack):
    """Writes ``sentence`` all over the image in faint letters; per example the best of four contrasts, light and dark,
    dense and spaced.

    Through a defense that reads the image, it searches for renderings that its OCR misses.
    """

    name: str = "typographic-faint"

    def renderings(self, clean: Tensor, budget: Budget) -> Iterator[Tensor]:
        for contrast, sign, gap in islice(product(_CONTRASTS, (1, -1), _GAPS), budget.steps):
            yield write_faint(clean, self.sentence, size=self.size, contrast=sign * contrast, gap=gap)
