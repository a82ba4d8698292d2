"""PNG files whose metadata is damaged and whose pixels are not."""

from __future__ import annotations

from zlib import crc32

_MAGIC = b"\x89PNG\r\n\x1a\n"
_ANCILLARY = 0x20  # the case of a chunk type's first letter


def drop_damaged_metadata(data: bytes) -> bytes:
    """Return a PNG without the ancillary chunks whose checksum is wrong, as libpng reads it; other files as they are.

    Pillow refuses such files as a whole. Critical chunks are left to it.
    """
    if not data.startswith(_MAGIC):
        return data
    view, pieces, start, place = memoryview(data), [], 0, len(_MAGIC)
    while place + 12 <= len(data):
        end = place + 12 + int.from_bytes(view[place : place + 4])
        damaged = end <= len(data) and crc32(view[place + 4 : end - 4]) != int.from_bytes(view[end - 4 : end])
        if damaged and view[place + 4] & _ANCILLARY:
            pieces.append(view[start:place])
            start = end
        place = end
    return b"".join([*pieces, view[start:]]) if pieces else data
