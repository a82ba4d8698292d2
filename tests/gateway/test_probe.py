"""Headers are read in bounded time, and as the decoders read them."""

from __future__ import annotations

import io
import random
import struct
import time
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from codefend.core import images
from codefend.gateway.errors import Refused
from codefend.gateway.limits import inspect
from codefend.gateway.options import Limits
from codefend.gateway.probe import Header, InvalidHeader, read_header
from codefend.gateway.worker import Job, Purified, Worker, WorkerOptions
from codefend.types import CodefendError
from gateway_kit import Invert, png


def encoded(kind: str, mode: str = "RGB", size: tuple[int, int] = (37, 23), **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, kind, **options)
    return buffer.getvalue()


FILES = [
    encoded("PNG"),
    encoded("PNG", "P", optimize=True),
    encoded("PNG", "I;16"),
    encoded("JPEG"),
    encoded("JPEG", "CMYK", progressive=True),
    encoded("JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"),
    encoded("WEBP"),
    encoded("WEBP", "RGBA"),
    encoded("WEBP", lossless=True),
    encoded("WEBP", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"),
    encoded("GIF", "P"),
    encoded("BMP"),
    encoded("BMP", "1"),
    encoded("TIFF"),
    encoded("TIFF", "I;16", compression="tiff_lzw"),
    encoded("TIFF", big_tiff=True),
]


@pytest.mark.parametrize("data", FILES)
def test_the_size_is_the_decoders(data: bytes) -> None:
    header, probe = read_header(data), images.probe(data)
    assert header == Header(probe.format, probe.width, probe.height)


def chunk(kind: bytes, content: bytes = b"") -> bytes:
    return struct.pack(">I", len(content)) + kind + content + b"\0\0\0\0"


def tiff(entries: int, count: int) -> bytes:
    head = b"II*\0" + struct.pack("<IH", 8, entries)
    return head + b"".join(struct.pack("<HHII", 1000 + i, 2, count, 0) for i in range(entries)) + b"\0" * count


JPEG, PNG = encoded("JPEG"), encoded("PNG")
SIZE = 15_000_000
HOSTILE: dict[str, Callable[[], bytes]] = {
    "fill bytes": lambda: JPEG[:2] + b"\xff" * SIZE + JPEG[2:],
    "empty segments": lambda: JPEG[:2] + b"\xff\xe5\0\x02" * (SIZE // 4) + JPEG[2:],
    "bare markers": lambda: JPEG[:2] + b"\xff\x01" * (SIZE // 2) + JPEG[2:],
    "scans": lambda: JPEG[:-2] + b"\xff\xda\0\x08\x01\x01\0\0\x3f\0" * 500 + JPEG[-2:],
    "exif of a JPEG": lambda: JPEG[:2] + (b"\xff\xe1\xff\xff" + b"Exif\0\0" + bytes(65_527)) * 3 + JPEG[2:],
    "chunks": lambda: PNG[:33] + chunk(b"teXt") * (SIZE // 12) + PNG[33:],
    "tiny pieces": lambda: PNG[:33] + chunk(b"IDAT", b"x") * (SIZE // 13) + PNG[33:],
    "exif of a PNG": lambda: PNG[:33] + chunk(b"eXIf", bytes(1 << 20)) + PNG[33:],
    "GIF blocks": lambda: encoded("GIF", "P")[:-2] + b"\x01x" * (SIZE // 2),
    "GIF extensions": lambda: b"GIF89a\x01\0\x01\0\0\0\0" + b"!\xfe\x01x\0" * (SIZE // 5),
    "TIFF entries": lambda: tiff(5000, 10),
    "overlapping TIFF values": lambda: tiff(200, 1 << 20),
    "WebP chunks": lambda: encoded("WEBP", "RGBA")[:30] + b"JUNK\0\0\0\0" * (SIZE // 8),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_files_made_to_keep_a_decoder_busy_are_refused_at_once(name: str) -> None:
    data = HOSTILE[name]()
    start = time.process_time()
    with pytest.raises(Refused) as refusal:
        inspect(data, Limits())
    assert time.process_time() - start < 0.25
    assert refusal.value.code == "invalid_image"


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(FILES), st.integers(0, 200), st.binary(min_size=1, max_size=8))
def test_a_damaged_header_is_refused_or_agrees_with_the_decoder(data: bytes, place: int, patch: bytes) -> None:
    data = data[:place] + patch + data[place + len(patch) :]
    try:
        header = read_header(data)
    except InvalidHeader:
        return
    try:
        probe = images.probe(data, max_pixels=1 << 40)
    except CodefendError:
        return
    if probe.width * probe.height != header.pixels:  # then the worker refuses it
        (result,) = Worker(Invert()).run([Job(data, pixels=header.pixels)])
        assert isinstance(result, Refused)


@pytest.mark.slow
def test_no_damaged_file_keeps_a_decoder_busy() -> None:
    """10,000 files with damage near their heads or anywhere: no crash, and none takes a second."""
    rng = random.Random(0)
    worker = Worker(Invert(), WorkerOptions(Limits(max_pixels=1_000_000, max_side=64)))
    for _ in range(10_000):
        data = bytearray(rng.choice(FILES))
        for _ in range(rng.randrange(1, 12)):
            place = rng.randrange(rng.choice((60, 400, len(data)))) % len(data)
            if rng.random() < 0.3:
                data[place:place] = rng.randbytes(rng.randrange(1, 40))
            else:
                data[place] = rng.choice((0, 1, 0x7F, 0xFF, rng.randrange(256)))
        start = time.process_time()
        try:
            job = Job(bytes(data), pixels=inspect(bytes(data), worker.options.limits).pixels)
            (result,) = worker.run([job])
            assert isinstance(result, (Purified, Refused)), result
        except Refused:
            pass
        assert time.process_time() - start < 1, bytes(data)


def test_a_second_header_does_not_make_a_small_image_large() -> None:
    second = chunk(b"IHDR", struct.pack(">IIBBBBB", 4000, 4000, 8, 2, 0, 0, 0))
    data = PNG[:33] + second + PNG[33:]
    (result,) = Worker(Invert()).run([Job(data, pixels=read_header(data).pixels)])
    assert isinstance(result, Refused)


def test_what_is_no_image_is_named() -> None:
    for data, words in ((b"", "is empty"), (b"%PDF-1.7", "is not an image"), (png(1)[:10], "damaged")):
        with pytest.raises(InvalidHeader, match=words):
            read_header(data)


def test_an_offset_beyond_the_file_is_damage() -> None:
    with pytest.raises(InvalidHeader, match="damaged"):
        read_header(b"II+\0\x08\0\0\0" + b"\xff" * 40)


def test_photographs_with_large_metadata_pass() -> None:
    pixels = np.zeros((8, 8, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", icc_profile=bytes(500_000), comment=b"x" * 60_000)
    assert read_header(buffer.getvalue()).pixels == 64
