"""Typographic attack: words written into the picture (Goh et al. 2021, "Multimodal Neurons"; FigStep, 2311.05608)."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from codefend.attacks.search import Best, OnGradient, OnStep, score
from codefend.attacks.text import Asked
from codefend.types import Budget, CodefendError

# Seven rows of five dots per character, two hexadecimal digits a row, the left dot in bit 4.
_GLYPHS = {
    " ": "00000000000000",
    "!": "04040404040004",
    '"': "0A0A0000000000",
    "'": "04040800000000",
    "(": "02040808080402",
    ")": "08040202020408",
    ",": "00000000060408",
    "-": "0000001F000000",
    ".": "00000000000C0C",
    "/": "01010204081010",
    ":": "000C0C000C0C00",
    "?": "0E110102040004",
    "0": "0E11131519110E",
    "1": "040C040404040E",
    "2": "0E11010204081F",
    "3": "1F02040201110E",
    "4": "02060A121F0202",
    "5": "1F101E0101110E",
    "6": "0608101E11110E",
    "7": "1F010204080808",
    "8": "0E11110E11110E",
    "9": "0E11110F01020C",
    "A": "0E11111F111111",
    "B": "1E11111E11111E",
    "C": "0E11101010110E",
    "D": "1C12111111121C",
    "E": "1F10101E10101F",
    "F": "1F10101E101010",
    "G": "0E11101711110F",
    "H": "1111111F111111",
    "I": "0E04040404040E",
    "J": "0702020202120C",
    "K": "11121418141211",
    "L": "1010101010101F",
    "M": "111B1515111111",
    "N": "11111915131111",
    "O": "0E11111111110E",
    "P": "1E11111E101010",
    "Q": "0E11111115120D",
    "R": "1E11111E141211",
    "S": "0F10100E01011E",
    "T": "1F040404040404",
    "U": "1111111111110E",
    "V": "11111111110A04",
    "W": "11111115151B11",
    "X": "11110A040A1111",
    "Y": "1111110A040404",
    "Z": "1F01020408101F",
}
_PLACES = (1.0, 0.0, 0.5)  # top of the strip, share of the free height: bottom, top, middle
_INKS = (1.0, 0.0)  # white on black, black on white


def render(text: str, columns: int) -> Tensor:
    """Dots of ``text`` in capitals, ``[H, W]`` of 0 and 1, in lines of at most ``columns`` characters.

    A character takes 6 by 8 dots with its gap; one that the font lacks becomes a space.
    """
    lines = textwrap.wrap(text.upper(), max(columns, 1)) or [""]
    width = max(len(line) for line in lines)
    dots = torch.zeros(8 * len(lines) + 1, 6 * width + 1)
    for row, line in enumerate(lines):
        for column, letter in enumerate(line):
            codes = bytes.fromhex(_GLYPHS.get(letter, _GLYPHS[" "]))
            glyph = torch.tensor([[code >> bit & 1 for bit in (4, 3, 2, 1, 0)] for code in codes])
            dots[8 * row + 1 : 8 * row + 8, 6 * column + 1 : 6 * column + 6] = glyph
    return dots


def write_on(images: Tensor, text: str, *, size: float = 0.1, place: float = 1.0, ink: float = 1.0) -> Tensor:
    """``images`` ``[B, 3, H, W]`` with ``text`` on an opaque strip across the picture, cut where it does not fit.

    ``size`` is a character's height as a share of the picture's (at least 8 pixels), ``place`` 0 the top and 1 the
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
    written = images.clone()
    written[:, :, top : top + dots.shape[0]] = strip
    return written


@dataclass(kw_only=True)
class Typographic:
    """Writes ``say`` on the picture; per example the best of three places and two inks. ``budget`` does not apply."""

    say: str = "nothing to see"
    size: float = 0.1  # height of a character, share of the picture's
    name: str = "typographic"
    on_step: OnStep | None = None
    on_gradient: OnGradient | None = None

    def __post_init__(self) -> None:
        if not 0 < self.size <= 1:
            raise CodefendError(f"size of attack 'typographic' is a share above 0, to 1, not {self.size:g}")

    def __call__(
        self,
        asked: Asked,
        images: Tensor,
        prompts: Sequence[str],
        budget: Budget,
        *,
        generator: Generator | None = None,
    ) -> tuple[Tensor, list[str]]:
        clean, objective = images.detach(), asked(prompts)
        best = Best(clean, score(self, objective, clean, budget.eot))
        last, number = clean, 0
        for place in _PLACES:
            for ink in _INKS:
                last = write_on(clean, self.say, size=self.size, place=place, ink=ink)
                best.update(last, score(self, objective, last, budget.eot, number))
                number += 1
        return best.settle(self, objective, last, budget), list(prompts)

    def outside(self, images: Tensor, clean: Tensor) -> Tensor:
        """0 for each image: words may be written over anything."""
        return torch.zeros(len(clean), dtype=clean.dtype, device=clean.device)
