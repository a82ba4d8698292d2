"""What is checked before an image is decoded: count, bytes, header, pixels, proportions."""

from __future__ import annotations

import binascii
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

from codefend.core.animations import MAX_FRAMES
from codefend.gateway.errors import Refused
from codefend.gateway.excise import restored
from codefend.gateway.options import Limits
from codefend.gateway.probe import Header, InvalidHeader, count_frames, read_header

_CHUNK = 1 << 20  # base64 characters decoded at a time: the decoder holds the interpreter lock
_SPACE = b" \t\r\n"


def check_count(count: int, limits: Limits) -> None:
    """Raise Refused (413) for too many images."""
    if count > limits.max_images:
        raise Refused(413, "too_many_images", f"{count} images; the limit is {limits.max_images} in one request")


def check_bytes(size: int, limits: Limits) -> None:
    """Raise Refused (413) for a file too large; ``size`` in bytes."""
    if size > limits.max_image_bytes:
        message = f"an image of {size:,} bytes; the limit is {limits.max_image_bytes:,}"
        raise Refused(413, "image_too_large", message)


def payload(reference: str, limits: Limits, *, cuts: Mapping[str, memoryview] = MappingProxyType({})) -> bytes:
    """Return the bytes of a data URL or of bare base64, measured before they are decoded. Raises Refused.

    ``cuts`` are what marks in the reference stand for (``excise``).
    """
    body = reference
    if reference[:5].lower() == "data:":
        head, comma, body = reference.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise Refused(400, "invalid_image", "expected data:image/...;base64,...")
    try:
        parts = list(restored(body, cuts))
        check_bytes(sum(map(len, parts)) * 3 // 4 - 2, limits)
        return b"".join(_decode_base64(parts))
    except ValueError as error:
        raise Refused(400, "invalid_image", "the image is not valid base64") from error


def _decode_base64(parts: Sequence[bytes | memoryview]) -> Iterator[bytes]:
    """Decode base64 in pieces, as if it were one. Raises ValueError."""
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


def inspect(data: bytes, limits: Limits) -> Header:
    """Read the header in bounded time. Raises Refused: 400 for what is no image, 413 for one that is too large."""
    check_bytes(len(data), limits)
    try:
        header = read_header(data)
    except InvalidHeader as error:
        raise Refused(400, "invalid_image", str(error)) from error
    check_size(header.width, header.height, limits)
    return header


def frames(data: bytes, header: Header, limits: Limits) -> int:
    """As how many images a file is purified; 0, not counted, unless all frames are. Raises Refused (400)."""
    try:
        count = count_frames(data, header.format, MAX_FRAMES + 1) if limits.all_frames else 0
    except InvalidHeader as error:
        raise Refused(400, "invalid_image", str(error)) from error
    if count > MAX_FRAMES:
        raise Refused(400, "invalid_image", f"an animation of over {MAX_FRAMES} frames, which is the limit")
    return count


def check_size(width: int, height: int, limits: Limits) -> None:
    """Raise Refused for too many pixels (413) and for a strip (400)."""
    if width * height > limits.max_pixels:
        message = f"{width}x{height} is {width * height:,} pixels; the limit is {limits.max_pixels:,}"
        raise Refused(413, "image_too_large", message)
    if max(width, height) > limits.max_ratio * min(width, height):
        message = f"{width}x{height} is longer than {limits.max_ratio:g} times its shorter side"
        raise Refused(400, "invalid_image", message)
