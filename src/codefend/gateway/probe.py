"""The size of an image from its header, in bounded time: all that the gateway's own process reads of an image.

A decoder reads headers in loops that a sender can make long: a million empty markers, a million chunks, directories
whose entries overlap. Files like that are refused here, after a bounded number of steps. What a decoder then finds must
agree with this size (`Worker` checks that), so that nobody is queued as small who is large.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass

MAX_SEGMENTS = 512  # JPEG markers or PNG chunks that hold no pixels, GIF blocks before the first frame
MAX_FILL_BYTES = 64  # 0xFF in a row between two JPEG markers
MAX_SCANS = 64  # of a progressive JPEG: each is a pass over all its pixels
MAX_EXIF_BYTES = 1 << 16  # its directory may name each byte thousands of times
MAX_TIFF_ENTRIES = 256
PIECE_BYTES = 1024  # mean size of the pieces that pixels come in, at least

_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_BARE = frozenset({0x01, *range(0xD0, 0xD9)})  # markers without a length
_TIFF_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}


class InvalidHeader(ValueError):
    """The header is damaged, cut short, or made to keep a decoder busy; the message says which."""


@dataclass(frozen=True)
class Header:
    format: str
    width: int
    height: int

    @property
    def pixels(self) -> int:
        return self.width * self.height


def read_header(data: bytes) -> Header:
    """Read format and size. Raises InvalidHeader."""
    for magic, offset, name, read in _FORMATS:
        if data[offset : offset + len(magic)] == magic:
            try:
                width, height = read(data)
            except (struct.error, IndexError, OverflowError) as error:  # the last: an offset of 64 bits
                raise InvalidHeader("the image is damaged or cut short") from error
            if width < 1 or height < 1:
                raise InvalidHeader(f"the image is damaged: it claims {width}x{height} pixels")
            return Header(name, width, height)
    what = "is not an image" if data else "is empty, not an image"
    raise InvalidHeader(f"the file {what} of a kind that can be read (PNG, JPEG, WebP, BMP, GIF, TIFF)")


def count_frames(data: bytes, kind: str, most: int) -> int:
    """Frames of an image file of a ``kind`` of `Header`, counted up to ``most``. Raises InvalidHeader."""
    if kind == "GIF":
        try:
            return max(1, _gif_frames(data, most))
        except IndexError as error:
            raise InvalidHeader("the image is damaged or cut short") from error
    marker = {"PNG": b"fcTL", "WEBP": b"ANMF"}.get(kind)
    return 1 if marker is None else min(max(1, data.count(marker)), most)


# AVIF and HEIC, JPEG XL, JPEG 2000, PSD, ICO, PNM, QOI, HDR, EXR, DDS, SVG
_OTHER_IMAGES = re.compile(
    rb"\0\0..ftyp(?:avi|hei|hev|mi[af]|msf)|\0\0\0\x0c(?:JXL|jP) |\xff\x0a|\xff\x4f\xff\x51|8BPS|\0\0[\1\2]\0"
    rb"|P[1-7Ff]\s|qoif|#\?R|v/1\x01|DDS |\s*<(?:svg|(?:\?xml|!)[^\0]{0,4096}?<svg)",
    re.DOTALL,
)


def is_other_image(data: bytes) -> bool:
    """Whether a file is an image of a kind that is not read here: AVIF, HEIC, JPEG XL, SVG, PSD, ..."""
    return _OTHER_IMAGES.match(data) is not None


def _too_complex(what: str) -> InvalidHeader:
    return InvalidHeader(f"the image has too many {what}; save it again without metadata")


def _png(data: bytes) -> tuple[int, int]:
    if data[12:16] != b"IHDR":
        raise InvalidHeader("the image is damaged: a PNG begins with IHDR")
    width, height = struct.unpack(">II", data[16:24])
    place, others, pieces = 8, 0, 0
    while place + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, place)
        if kind == b"IDAT" or kind == b"fdAT":
            pieces += 1
        else:
            others += 1
            if kind == b"eXIf" and size > MAX_EXIF_BYTES:
                raise _too_complex("bytes of EXIF")
        if others > MAX_SEGMENTS or pieces > MAX_SEGMENTS + len(data) // PIECE_BYTES:
            raise _too_complex("chunks")
        if kind == b"IEND":
            break
        place += size + 12
    return width, height


def _jpeg(data: bytes) -> tuple[int, int]:
    if data.count(b"\xff\xda") > MAX_SCANS:
        raise _too_complex("scans")
    place, exif = 2, 0
    for _ in range(MAX_SEGMENTS):
        start = place
        while data[place] == 0xFF:
            place += 1
            if place - start > MAX_FILL_BYTES:
                raise _too_complex("fill bytes")
        if place == start:
            raise InvalidHeader("the image is damaged: a JPEG marker is missing")
        marker = data[place]
        place += 1
        if marker in _JPEG_BARE:
            continue
        (size,) = struct.unpack_from(">H", data, place)
        if marker in _JPEG_FRAMES:
            height, width = struct.unpack_from(">HH", data, place + 3)
            return width, height
        if marker == 0xE1 and data[place + 2 : place + 6] == b"Exif":
            exif += size
        if exif > MAX_EXIF_BYTES:
            raise _too_complex("bytes of EXIF")
        if marker in (0xD9, 0xDA) or size < 2:
            raise InvalidHeader("the image is damaged: a JPEG frame is missing")
        place += size
    raise _too_complex("segments")


def _webp(data: bytes) -> tuple[int, int]:
    kind = data[12:16]
    if kind == b"VP8X":
        _check_webp_chunks(data)
        width = int.from_bytes(data[24:27], "little") + 1
        height = int.from_bytes(data[27:30], "little") + 1
        return width, height
    if kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    raise InvalidHeader("the image is damaged: a WebP begins with VP8, VP8L or VP8X")


def _check_webp_chunks(data: bytes) -> None:
    place, count = 12, 0
    while place + 8 <= len(data):
        kind, size = struct.unpack_from("<4sI", data, place)
        if kind == b"EXIF" and size > MAX_EXIF_BYTES:
            raise _too_complex("bytes of EXIF")
        count += 1
        if count > MAX_SEGMENTS + len(data) // PIECE_BYTES:
            raise _too_complex("chunks")
        place += 8 + size + size % 2


def _gif(data: bytes) -> tuple[int, int]:
    _gif_frames(data, 1)
    width, height = struct.unpack_from("<HH", data, 6)
    return width, height


def _gif_frames(data: bytes, most: int) -> int:
    frames, place = 0, 13 + (3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0)
    limit, blocks = MAX_SEGMENTS, 0
    while place < len(data) and frames < most:
        kind, place = data[place], place + 1
        if kind == 0x2C:  # a frame: its pixels come in blocks of 255 bytes
            frames += 1
            flags = data[place + 8]
            place += 9 + (3 << (flags & 7) + 1 if flags & 0x80 else 0) + 1
            limit = MAX_SEGMENTS + len(data) * 8 // PIECE_BYTES
        elif kind == 0x21:
            place += 1
        elif kind == 0x3B or most == 1:
            break
        else:  # decoders skip junk between blocks
            blocks += 1
            continue
        while place < len(data) and data[place]:
            place += 1 + data[place]
            blocks += 1
            if blocks > limit:
                raise _too_complex("blocks")
        place += 1
    return frames


def _bmp(data: bytes) -> tuple[int, int]:
    (size,) = struct.unpack_from("<I", data, 14)
    width, height = struct.unpack_from("<HH" if size == 12 else "<ii", data, 18)
    return width, abs(height)


def _tiff(data: bytes) -> tuple[int, int]:
    order = "<" if data[:2] == b"II" else ">"
    big = data[2:4] in (b"+\0", b"\0+")
    (place,) = struct.unpack_from(f"{order}{'Q' if big else 'I'}", data, 8 if big else 4)
    (entries,) = struct.unpack_from(f"{order}{'Q' if big else 'H'}", data, place)
    if entries > MAX_TIFF_ENTRIES:
        raise _too_complex("directory entries")
    place += 8 if big else 2
    sides: dict[int, int] = {}
    total = 0
    for i in range(entries):
        entry = place + i * (20 if big else 12)
        tag, kind = struct.unpack_from(f"{order}HH", data, entry)
        (count,) = struct.unpack_from(f"{order}{'Q' if big else 'I'}", data, entry + 4)
        total += count * _TIFF_SIZES.get(kind, 1)
        if tag in (256, 257):
            width = {3: "H", 4: "I"}.get(kind, "Q" if big else "I")
            (sides[tag],) = struct.unpack_from(f"{order}{width}", data, entry + (12 if big else 8))
    if total > len(data):
        raise _too_complex("bytes in its directory")
    return sides.get(256, 0), sides.get(257, 0)


_FORMATS: tuple[tuple[bytes, int, str, Callable[[bytes], tuple[int, int]]], ...] = (
    (b"\x89PNG\r\n\x1a\n", 0, "PNG", _png),
    (b"\xff\xd8\xff", 0, "JPEG", _jpeg),
    (b"WEBP", 8, "WEBP", _webp),
    (b"GIF87a", 0, "GIF", _gif),
    (b"GIF89a", 0, "GIF", _gif),
    (b"BM", 0, "BMP", _bmp),
    (b"II*\0", 0, "TIFF", _tiff),
    (b"MM\0*", 0, "TIFF", _tiff),
    (b"II+\0", 0, "TIFF", _tiff),
    (b"MM\0+", 0, "TIFF", _tiff),
)
