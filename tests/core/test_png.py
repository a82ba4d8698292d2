"""Damaged metadata of PNG files is dropped; damaged pixels are not accepted."""

from __future__ import annotations

import io

import pytest
import torch
from PIL import Image, PngImagePlugin

from codefend.core import images
from codefend.core.png import drop_damaged_metadata
from codefend.types import CodefendError


def file(*, damaged: bytes) -> bytes:
    """A PNG with a text, where a byte of the checksum of the chunks of one type is another."""
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "hello")
    buffer = io.BytesIO()
    Image.effect_noise((16, 12), 50).convert("RGB").save(buffer, "PNG", pnginfo=info)
    data = bytearray(buffer.getvalue())
    place = data.index(damaged)
    data[place + 4 + int.from_bytes(data[place - 4 : place])] ^= 1
    return bytes(data)


def test_a_damaged_text_does_not_cost_the_image() -> None:
    data = file(damaged=b"tEXt")
    repaired = drop_damaged_metadata(data)
    assert b"hello" in data
    assert b"hello" not in repaired
    assert images.load(repaired).pixels.shape == (3, 12, 16)
    assert drop_damaged_metadata(repaired) is repaired


def test_a_damaged_header_is_left_to_the_decoder() -> None:
    data = file(damaged=b"IHDR")
    assert drop_damaged_metadata(data) is data
    with pytest.raises(CodefendError):
        images.load(data)


def test_other_and_shortened_files_come_back_as_they_are() -> None:
    data = images.encode(torch.rand(3, 8, 8))
    for other in (b"", b"\xff\xd8\xff", data[:20], data[:-6], data + b"trailing bytes behind the end"):
        assert drop_damaged_metadata(other) is other
