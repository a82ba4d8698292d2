"""The reading of text in images: corners and order of lines in the text's own direction."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont

from codefend.purifiers import ocr

TEXT = ["the first line of a note", "a second one, much longer", "and the end"]


@pytest.fixture(scope="module")
def note() -> Image.Image:
    image = Image.new("RGB", (320, 320), "white")
    font = ImageFont.truetype(str(Path(get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), 18)
    ImageDraw.Draw(image).multiline_text((30, 110), "\n".join(TEXT), fill="black", font=font, spacing=10)
    return image


@pytest.mark.parametrize("quarters", [0, 1, 2, 3])
def test_lines_of_turned_text_are_read_in_order(note: Image.Image, quarters: int) -> None:
    image = np.ascontiguousarray(np.rot90(np.asarray(note), -quarters)) / 255.0
    regions = ocr.read(torch.from_numpy(image).permute(2, 0, 1).float())
    assert [region.text.replace(" ", "") for region in regions] == [line.replace(" ", "") for line in TEXT]
    assert [region.place[0] for region in regions] == [quarters] * 3
    assert all(12 < region.height < 34 for region in regions)  # of the letters, not the length of the line


def test_each_line_of_small_text_on_a_large_page_is_read_once() -> None:
    page = Image.new("RGB", (700, 700), "white")
    font = ImageFont.truetype(str(Path(get_data_path()) / "fonts/ttf/DejaVuSansMono.ttf"), 16)
    for i, text in enumerate(TEXT):
        ImageDraw.Draw(page).text((50, 60 + 200 * i), text, fill="black", font=font)
    regions = ocr.read(torch.from_numpy(np.asarray(page) / 255.0).permute(2, 0, 1).float())
    assert [region.text.replace(" ", "") for region in regions] == [line.replace(" ", "") for line in TEXT]


def test_text_in_two_directions_is_read_one_after_the_other() -> None:
    def line(text: str, x: float, y: float, *, turned: bool) -> ocr.TextRegion:
        corners = ((x, y), (x, y + 60), (x - 9, y + 60), (x - 9, y)) if turned else ()
        return ocr.TextRegion(text, 1.0, corners or ((x, y), (x + 60, y), (x + 60, y + 9), (x, y + 9)))

    regions = [
        line("down 2", 60, 5, turned=True),
        line("across", 0, 90, turned=False),
        line("down 1", 80, 5, turned=True),
    ]
    assert [region.text for region in ocr._in_reading_order(regions)] == ["across", "down 1", "down 2"]


def test_one_line_read_upside_down_among_others_keeps_their_direction() -> None:
    boxes = [((0.0, y), (60.0, y), (60.0, y + 9), (0.0, y + 9)) for y in (0.0, 11.0, 22.0)]
    boxes[1] = boxes[1][2:] + boxes[1][:2]
    regions = [ocr.TextRegion(text, 1.0, box) for text, box in zip(("above", "tod", "below"), boxes, strict=True)]
    common = ocr._with_common_direction(regions)
    assert [region.place[0] for region in regions] == [0, 2, 0]
    assert [region.text for region in ocr._in_reading_order(common)] == ["above", "tod", "below"]
    assert [region.place[0] for region in common] == [0, 0, 0]
