"""What is checked before an image is decoded: count, bytes, format, frames, pixels, proportions."""

from __future__ import annotations

import binascii
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from codefend.core import images
from codefend.gateway.errors import Refused
from codefend.gateway.excise import restored
from codefend.types import CodefendError

_CHUNK = 1 << 20  # base64 characters decoded at a time: the decoder holds the interpreter lock
_SPACE = b" \t\r\n"


@dataclass(frozen=True)
class Limits:
    max_body_bytes: int = 64 << 20
    max_image_bytes: int = 20 << 20
    max_pixels: int = 64_000_000  # of one image
    max_ratio: float = 100.0  # longer side / shorter side
    max_images: int = 20  # of one request
    first_frame: bool = False  # take the first frame of an animation instead of refusing it
    max_side: int = 0  # longer side, pixels, to which larger images are shrunk before they are purified; 0: not at all


def check_count(count: int, limits: Limits) -> None:
    """Raise Refused (413) for too many images."""
    if count > limits.max_images:
        raise Refused(413, "too_many_images", f"{count} images; the limit is {limits.max_images} in one request")


def check_bytes(size: int, limits: Limits, *, where: str = "") -> None:
    """Raise Refused (413) for a file too large; ``size`` in bytes."""
    if size > limits.max_image_bytes:
        message = f"an image of {size:,} bytes; the limit is {limits.max_image_bytes:,}"
        raise Refused(413, "image_too_large", message, where=where)


def payload(
    reference: str, limits: Limits, *, where: str = "", cuts: Mapping[str, memoryview] = MappingProxyType({})
) -> bytes:
    """Return the bytes of a data URL or of bare base64, measured before they are decoded. Raises Refused.

    ``cuts`` are what marks in the reference stand for (``excise``).
    """
    body = reference
    if reference[:5].lower() == "data:":
        head, comma, body = reference.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise Refused(400, "invalid_image", "expected data:image/...;base64,...", where=where)
    try:
        parts = list(restored(body, cuts))
        check_bytes(sum(map(len, parts)) * 3 // 4 - 2, limits, where=where)
        return b"".join(_decoded(parts))
    except ValueError as error:
        raise Refused(400, "invalid_image", "the image is not valid base64", where=where) from error


def _decoded(parts: Sequence[bytes | memoryview]) -> Iterator[bytes]:
    """Base64 in pieces, as if it were one. Raises ValueError."""
    rest = b""
    for part in parts:
        for i in range(0, len(part), _CHUNK):
            chunk = rest + bytes(part[i : i + _CHUNK]).translate(None, _SPACE)
            if rest and b"=" in rest:
                raise ValueError("padding before the end")
            whole = max(0, len(chunk) - 4) // 4 * 4  # the last four wait: only they may be padded
            yield binascii.a2b_base64(chunk[:whole], strict_mode=True)
            rest = chunk[whole:]
            if b"=" in chunk[:whole]:
                raise ValueError("padding before the end")
    yield binascii.a2b_base64(rest, strict_mode=True)


def inspect(data: bytes, limits: Limits, *, where: str = "") -> images.Probe:
    """Read the header, decode nothing. Raises Refused: 400 for what is no picture, 413 for one that is too large."""
    check_bytes(len(data), limits, where=where)
    try:
        found = images.probe(data)
    except CodefendError as error:
        raise Refused(400, "invalid_image", str(error), where=where) from error
    pixels, sides = found.width * found.height, (found.width, found.height)
    if pixels > limits.max_pixels:
        message = f"{found.width}x{found.height} is {pixels:,} pixels; the limit is {limits.max_pixels:,}"
        raise Refused(413, "image_too_large", message, where=where)
    if max(sides) > limits.max_ratio * min(sides):
        message = f"{found.width}x{found.height} is longer than {limits.max_ratio:g} times its width"
        raise Refused(400, "invalid_image", message, where=where)
    if found.animated and not limits.first_frame:
        raise Refused(400, "animated_image", "animated or of several pages; send one still picture", where=where)
    return found
