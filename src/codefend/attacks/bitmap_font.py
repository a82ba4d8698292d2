"""A bitmap font for text in images."""

from __future__ import annotations

import textwrap

import torch
from torch import Tensor

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
