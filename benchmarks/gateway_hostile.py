"""Requests for the soak: valid ones, and those that an attacker would send. Every image carries a mark."""

from __future__ import annotations

import base64
import io
import json
import random
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

MARK = b"CODEFEND-SOAK-ORIGINAL"  # in every file sent: re-encoding must lose it
SIDES = (32, 64, 200, 400)  # pixels, of marked images
PATHS = {"chat": "/v1/chat/completions", "responses": "/v1/responses", "messages": "/v1/messages"}
Floats = NDArray[np.float64]
Request = tuple[str, bytes, frozenset[int]]  # API, body, statuses that are correct, besides those of a busy gateway

GOOD = frozenset({200})
REFUSED = frozenset({400, 413})


def marked_image(rng: random.Random, kind: str = "", side: int = 0) -> bytes:
    """A marked file. Blocks of 8 x 8 pixels have one colour each, and the pattern of `survived` lies over them."""
    side = side or rng.choice(SIDES)
    blocks = np.random.default_rng(rng.getrandbits(32)).integers(64, 192, (side // 8 + 1, side // 8 + 1, 3))
    colours = np.repeat(np.repeat(blocks, 8, 0), 8, 1)[:side, :side]
    pixels = (colours + pattern(side)[..., None]).astype(np.uint8)
    kind = kind or rng.choice(("PNG", "PNG", "JPEG", "WEBP", "BMP", "TIFF"))
    options: dict[str, Any] = {"quality": 95} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    if kind == "PNG":
        options["pnginfo"] = PngImagePlugin.PngInfo()
        options["pnginfo"].add_text("Comment", MARK.decode())
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue() + MARK


def pattern(side: int) -> Floats:
    """The mark in the pixels, [side, side]: noise of cells of 2 x 2 pixels and 10 of 255 levels, the same in all."""
    cells = np.random.default_rng(0).choice((-10.0, 10.0), (max(SIDES) // 2, max(SIDES) // 2))
    return np.repeat(np.repeat(cells, 2, 0), 2, 1)[:side, :side]


def survived(data: bytes) -> bool:
    """Whether an image that reached the upstream is an original: by its bytes, or by the pattern in its pixels.

    Other files with the same pixels, JPEG and shrinking by area leave most of the pattern, purifiers about half.
    """
    pixels = np.asarray(Image.open(io.BytesIO(data)).convert("L"), dtype=float)
    return MARK in data or any(share(pixels, side) > 0.7 for side in SIDES if side >= max(pixels.shape))


def share(pixels: Floats, side: int) -> float:
    """How much of the pattern of an image of ``side`` is in ``pixels``, grey levels: 1 all, 0 nothing."""
    height, width = pixels.shape
    mark = Image.fromarray(pattern(side).astype(np.float32)).resize((width, height), Image.Resampling.BOX)
    expected = without_blocks(np.asarray(mark, dtype=float))
    return float((without_blocks(pixels) * expected).sum() / (expected**2).sum())


def without_blocks(pixels: Floats) -> Floats:
    """Less the mean of 5 x 5 pixels around each: the pattern stays, the colours of the blocks go."""
    around = np.lib.stride_tricks.sliding_window_view(np.pad(pixels, 2, mode="edge"), (5, 5)).mean((2, 3))
    return pixels - around


def body(api: str, files: list[bytes], model: str, *, stream: bool = False) -> bytes:
    urls = [f"data:image/png;base64,{base64.b64encode(data).decode()}" for data in files]
    shaped: dict[str, Any] = {"model": model, "stream": stream}
    if api == "chat":
        parts: list[Any] = [{"type": "text", "text": "what?"}]
        parts += [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        shaped["messages"] = [{"role": "user", "content": parts}]
    elif api == "responses":
        shaped["input"] = [{"role": "user", "content": [{"type": "input_image", "image_url": url} for url in urls]}]
    else:
        sources = [{"type": "base64", "media_type": "image/png", "data": url.partition(",")[2]} for url in urls]
        blocks = [{"type": "image", "source": source} for source in sources]
        shaped |= {"max_tokens": 9, "messages": [{"role": "user", "content": blocks or "hi"}]}
    return json.dumps(shaped).encode()


def png(width: int, height: int, data: bytes, *, kind: int = 2) -> bytes:
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def animation() -> bytes:
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def scrambled(rng: random.Random) -> bytes:
    data = bytearray(marked_image(rng))
    for _ in range(rng.randrange(1, 40)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)


BAD_FILES: list[Callable[[random.Random], bytes]] = [
    lambda rng: marked_image(rng, "PNG")[: rng.randrange(1, 200)],
    lambda rng: png(40_000, 40_000, b""),  # claims 1.6 billion pixels
    lambda rng: png(2, 1500, zlib.compress(bytes(10_000))),  # a needle
    lambda rng: animation(),
    lambda rng: b"",
    lambda rng: b"%PDF-1.7\n" + rng.randbytes(500),
    lambda rng: b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    lambda rng: b"II*\0" + struct.pack("<IH", 8, 60_000) + rng.randbytes(4000),  # a TIFF of 60,000 tags
    lambda rng: b"RIFF\xff\xff\xff\x7fWEBPVP8X" + rng.randbytes(300),
    lambda rng: b"\xff\xd8\xff\xe0" + rng.randbytes(3000),
    lambda rng: rng.randbytes(3_000_000),  # over the limit of a file
]
PART = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
BAD_BODIES: list[Callable[[random.Random], bytes]] = [
    lambda rng: b'{"messages":[],"messages":[]}',
    lambda rng: b'{"messages":[NaN]}',
    lambda rng: b"[" * 100_000,
    lambda rng: b'{"a":' * 5000,
    lambda rng: rng.randbytes(2000),
    lambda rng: json.dumps({"messages": [{"role": "user", "content": [PART | {"type": "video_url"}]}]}).encode(),
    lambda rng: json.dumps({"messages": [{"role": "user", "content": [PART | {"also": 1}]}]}).encode(),
    lambda rng: json.dumps(
        {"messages": [{"content": [PART | {"image_url": {"url": "http://169.254.169.254/x.png"}}]}]}
    ).encode(),
    lambda rng: json.dumps({"messages": [{"content": [PART] * 30}]}).encode(),
    lambda rng: b'{"messages":[' + b"1," * 1_500_000 + b"1]}",
    lambda rng: b'{"messages":"' + b"x" * 9_000_000 + b'"}',  # over the limit of a body
]


def good(rng: random.Random, keep: list[bytes], model: str, *, stream: bool = False) -> Request:
    """One to three marked images, sometimes one that was sent before, or none."""
    files = [rng.choice(keep) if keep and rng.random() < 0.3 else marked_image(rng) for _ in range(rng.randrange(4))]
    keep[:] = [*keep, *files][-20:]
    api = rng.choice(list(PATHS))
    return api, body(api, files, model, stream=stream), GOOD


def hostile(rng: random.Random) -> Request:
    if rng.random() < 0.3:
        return "chat", rng.choice(BAD_BODIES)(rng), REFUSED
    api = rng.choice(list(PATHS))
    if rng.random() < 0.2:  # damaged, or with 100 times the pixels that it claims: decoders may live with either
        surplus = png(300, 300, zlib.compress(bytes(27_000_000), 9))
        return api, body(api, [rng.choice((scrambled(rng), surplus))], "ok"), REFUSED | GOOD
    return api, body(api, [marked_image(rng, side=64), rng.choice(BAD_FILES)(rng)], "ok"), REFUSED
