"""The format of an image file by its first bytes, without a decoder."""

from __future__ import annotations

import re

HEAD = 32  # bytes that decide

_STARTS = {
    "PNG": (b"\x89PNG\r\n\x1a\n",),
    "JPEG": (b"\xff\xd8\xff",),
    "BMP": (b"BM",),
    "GIF": (b"GIF87a", b"GIF89a"),
    "TIFF": (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
}
_BMP_HEADERS = (12, 16, 40, 52, 56, 64, 108, 124)  # sizes: the two letters alone begin texts as well
_UNSUPPORTED = re.compile(rb"\0\0..ftyp(?:avi|hei|hev|mi[af]|msf)|\0\0\0\x0c(?:JXL|jP) |\xff\x4f\xff\x51", re.DOTALL)


def format_of_head(head: bytes) -> str | None:
    """The readable format that begins with ``head``: PNG, JPEG, WEBP, BMP, GIF or TIFF."""
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    return next((kind for kind, starts in _STARTS.items() if head.startswith(starts)), None)


def is_image(head: bytes) -> bool:
    """Whether a file of any name that begins with these `HEAD` bytes is an image: also AVIF, HEIC, JPEG 2000 and JPEG
    XL (in its container), which no decoder here reads.
    """
    kind = format_of_head(head)
    if kind == "BMP":
        return int.from_bytes(head[14:18], "little") in _BMP_HEADERS
    return kind is not None or _UNSUPPORTED.match(head) is not None
