"""Long strings are cut out of a body before it is parsed, and images are decoded from where they lay.

A JSON parser reads one string in one go and holds the interpreter meanwhile: 3 ms for every MB of base64 during which
the event loop stands still. What is cut out never becomes a Python string at all.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field

LONG = 1 << 16  # bytes between two quotes that are worth cutting out
KEPT = 1024  # at either end stay: what `suspicion` looks at, and a data URL's head
_STEP = LONG // 2  # every string of that length covers a multiple of it
_MARK_BYTES = re.compile(rb"~[0-9a-f]{32}\.[0-9]+~")
_MARK = re.compile(r"~[0-9a-f]{32}\.\d+~")  # "~" is neither base64 nor JSON's own


@dataclass(frozen=True)
class Excised:
    """``raw`` has a mark inside each long string; ``cuts`` says what each mark stands for."""

    raw: bytes
    cuts: Mapping[str, memoryview] = field(default_factory=dict)

    def put_back(self, *, keep: Container[str]) -> Excised:
        """The same with only the marks in ``keep`` left, and what the others stand for in its place again."""
        raw = _MARK_BYTES.sub(
            lambda match: match[0] if (mark := match[0].decode()) in keep else bytes(self.cuts.get(mark, match[0])),
            self.raw,
        )
        return Excised(raw, {mark: cut for mark, cut in self.cuts.items() if mark in keep})


def excise(raw: bytes) -> Excised:
    """Cut out what lies between quotes far apart, unless it holds a backslash. Linear, at the speed of memchr.

    This is no parser: two quotes may also be the end of one string and the start of another, with numbers between.
    A mark there makes the body invalid, as it does wherever a body was so before. Inside a string it stands for text
    that must be put back and looked at, as callers do with a mark that is not in an image.
    """
    cuts: dict[str, memoryview] = {}
    pieces: list[bytes | memoryview] = []
    view, nonce, end, done = memoryview(raw), secrets.token_hex(16), 0, 0
    for place in range(_STEP, len(raw), _STEP):
        if place < end:
            continue
        start = raw.rfind(b'"', end, place)
        end = raw.find(b'"', place)
        if end < 0:
            break
        if start < 0 or end - start <= LONG or raw.find(b"\\", start, end) >= 0:
            continue
        mark = f"~{nonce}.{len(cuts)}~"
        cuts[mark] = view[start + KEPT : end - KEPT]
        pieces += [view[done : start + KEPT], mark.encode()]
        done = end - KEPT
    return Excised(b"".join([*pieces, view[done:]]), cuts) if cuts else Excised(raw)


def marks(text: str) -> list[str]:
    """The marks in a string, in order."""
    return _MARK.findall(text) if len(text) > KEPT else []


def restored(text: str, cuts: Mapping[str, memoryview]) -> Iterator[bytes | memoryview]:
    """The string's bytes with each mark's content in its place. Raises ValueError (UnicodeEncodeError) beyond ASCII."""
    end = 0
    for match in _MARK.finditer(text) if cuts else ():
        if match[0] in cuts:
            yield text[end : match.start()].encode("ascii")
            yield cuts[match[0]]
            end = match.end()
    yield text[end:].encode("ascii")
