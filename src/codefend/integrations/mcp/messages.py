"""Where the images of an MCP message are, and the same message with others. Pure functions.

Images are recognized by their content, at any depth: as image blocks and binary resources, as data URLs and as base64
in whatever string, so that no shape of a message hides one. What a client would have to fetch itself is no image of
the message and passes: links to images, in texts and as ``resource_link``.
"""

from __future__ import annotations

import binascii
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal
from urllib.parse import unquote

from codefend.gateway.errors import Refused
from codefend.gateway.limits import check_count, payload
from codefend.gateway.options import Limits
from codefend.gateway.probe import is_other_image
from codefend.gateway.rewrite import EncodedImage
from codefend.gateway.wire import dump, parse_long

Documents = Literal["refuse", "pass"]  # what happens to PDFs

EMPTY_URL = "data:,"  # stands for an image in a data URL that cannot be purified, such as an SVG icon
_SHORTEST = 40  # characters of base64: no image file is smaller
_HEAD = 128  # characters of base64 by which a file is recognized

_PIXELS = re.compile(rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|RIFF....WEBP|GIF8[79]a|BM.{4}\0{4}|II[*+]\0|MM\0[*+]", re.DOTALL)
_PDF_FILE = re.compile(rb".{0,64}?%PDF-", re.DOTALL)

# Base64 as texts hold it: also URL-safe, percent-encoded, with a JSON string's "\/", and in lines.
_CHARACTER = r"(?:[A-Za-z0-9+/_%=-]|\\/)"
_BASE64 = rf"{_CHARACTER}++(?:(?<!=)(?:\s|\\[nr])++{_CHARACTER}{{16,}}+)*+"
_MAGIC = (  # the start of PNG, JPEG, GIF, WebP, TIFF, BMP, and of AVIF and HEIC files in base64
    r"(?:iVBORw0KGg|[/_]9j[/_]|\\/9j|R0lGOD[dl]h|UklGR|SUkqA|SUkrA|TU0AK|Qk[\w+/-]{6}AAAAA|AAAA[\w+/-]{2}Z0eX)"
)
_WRITTEN = re.compile(
    rf"(?i:data:)(?P<type>[\w.+-]*+(?:/[\w.+-]++)?+)(?P<rest>(?:;[^,;\s\"'<>]{{0,99}}+)*+),(?P<content>{_BASE64})?+"
    rf"|(?<![A-Za-z0-9+/_-])(?P<bare>{_MAGIC}{_BASE64})"
)
_HINTS = ("iVBOR", "9j", "R0lGOD", "UklGR", "SUk", "TU0", "Qk", "AAAA")  # one of these is in whatever _MAGIC matches
_STRICT = re.compile(r"[A-Za-z0-9+/]*+={0,2}\Z")
_URL_SAFE = str.maketrans("-_", "+/")


@dataclass(frozen=True)
class Span:
    """An image that stands in ``holder[key][start:end]``.

    ``data`` is the image file, or None for one that no purifier can read. A ``url`` is written as a data URL, and is
    emptied where it cannot be purified: the text around it is still of use.
    """

    holder: Any  # a list or an object of the message
    key: Any
    start: int
    end: int
    data: bytes | None
    url: bool = False


@dataclass(frozen=True)
class Reading:
    """A parsed message and its images, in no particular order."""

    message: Any
    spans: tuple[Span, ...]


def read(raw: bytes, limits: Limits, documents: Documents = "refuse") -> Reading:
    """Parse a message and find its images. Raises Refused for what cannot be inspected, as `Engine.read` does."""
    message = parse_long(raw)
    if not isinstance(message, (dict, list)):
        raise Refused(400, "invalid_request", "a message is a JSON object or a list of them")
    found = (span for holder, key, text in _strings(message) for span in _find(holder, key, text, limits, documents))
    spans = tuple(islice(found, limits.max_images + 1))
    check_count(len(spans), limits)
    return Reading(message, spans)


def write(reading: Reading, images: Sequence[EncodedImage | None], note: str = "") -> bytes:
    """The message as one line, with ``images`` in the places of its spans; None empties a data URL.

    A ``note`` on the images becomes a text block behind a tool's others. Raises Refused for one in another message.
    """
    changes = sorted(zip(reading.spans, images, strict=True), key=lambda change: -change[0].start)
    for span, image in changes:  # the last of a string first: the places of the others stay
        text = span.holder[span.key]
        if image is None:
            written = EMPTY_URL
        else:
            written = f"data:{image.media_type};base64,{image.data}" if span.url else image.data
            if span.end - span.start == len(text) and _declares(span.holder, "image/"):
                span.holder["mimeType"] = image.media_type
        span.holder[span.key] = text[: span.start] + written + text[span.end :]
    if note:
        result = reading.message.get("result") if isinstance(reading.message, dict) else None
        content = result.get("content") if isinstance(result, dict) else None
        if not isinstance(content, list):
            message = (
                "an image holds text that reads like instructions, and only a tool's result has a place to quote it"
            )
            raise Refused(400, "image_text_blocked", message)
        content.append({"type": "text", "text": note})
    return dump(reading.message) + b"\n"


def _strings(message: Any) -> Iterator[tuple[Any, Any, str]]:
    """Every string value: the list or object that holds it, its index or key, and the string."""
    waiting = [message]
    while waiting:
        holder = waiting.pop()
        for key, value in list(holder.items() if isinstance(holder, dict) else enumerate(holder)):
            if isinstance(value, str):
                yield holder, key, value
            elif isinstance(value, (dict, list)):
                waiting.append(value)


def _find(holder: Any, key: Any, text: str, limits: Limits, documents: Documents) -> Iterator[Span]:
    if isinstance(holder, dict) and key == "data" and holder.get("type") == "image":
        yield Span(holder, key, 0, len(text), payload(_plain(text), limits))
    elif isinstance(holder, dict) and key == "blob":
        yield from _find_resource(holder, key, text, limits, documents)
    elif isinstance(holder, dict) and key == "text" and _declares(holder, "image/"):
        raise _unreadable(f"a text resource of type {holder['mimeType'][:40]}")
    elif any(hint in text for hint in _HINTS) or "data:" in text.lower():  # a tenth of the time of the search
        for match in _WRITTEN.finditer(text):
            span = _written(holder, key, match, limits)
            if span is not None:
                yield span


def _find_resource(holder: Any, key: Any, text: str, limits: Limits, documents: Documents) -> Iterator[Span]:
    """A binary resource: an image by its content, or by its declared type."""
    head = _head(text)
    if _declares(holder, "image/") or _is_image(head):
        yield Span(holder, key, 0, len(text), payload(_plain(text), limits))
    elif documents == "refuse" and (_declares(holder, "application/pdf") or _PDF_FILE.match(head)):
        message = "a PDF may hold any image and is not passed on (--documents pass)"
        raise Refused(400, "unknown_content", message, where="blob")
    elif "uri" in holder and not _STRICT.match(_plain(text)):  # clients that skip other characters may find an image
        raise Refused(400, "unknown_content", "a binary resource is not valid base64", where="blob")


def _written(holder: Any, key: Any, match: re.Match[str], limits: Limits) -> Span | None:
    """The image of a data URL or of base64 in a text; None for what holds none."""
    group = "content" if match["bare"] is None else "bare"
    content, declared = match[group] or "", (match["type"] or "").lower().startswith("image/")
    if not declared and (len(content) < _SHORTEST or not _is_image(_head(content))):
        return None
    if not declared and not (match["rest"] or "").lower().endswith(";base64"):
        return Span(holder, key, match.start(group), match.end(group), payload(_plain(content), limits))
    try:
        data = payload(_plain(content), limits) if match["rest"].lower().endswith(";base64") else None
    except Refused:
        data = None
    return Span(holder, key, match.start(), match.end(), data, url=True)


def _is_image(head: bytes) -> bool:
    """Whether a file is an image by its first bytes, of a kind that can be purified or not."""
    return _PIXELS.match(head) is not None or is_other_image(head)


def _declares(holder: Any, kind: str) -> bool:
    declared = holder.get("mimeType") if isinstance(holder, dict) else None
    return isinstance(declared, str) and declared.strip().lower().startswith(kind)


def _head(text: str) -> bytes:
    """The first bytes of a file in base64; empty when it is none."""
    start = _plain(text[: 4 * _HEAD])[:_HEAD]
    try:
        return binascii.a2b_base64(start[: len(start) // 4 * 4])
    except binascii.Error:
        return b""


def _plain(text: str) -> str:
    """Base64 in its standard form, from any in which a text may hold it. A data URL stays one."""
    if text[:5].lower() == "data:" or (len(text) % 4 == 0 and _STRICT.match(text)):
        return text
    if "%" in text:
        text = unquote(text)
    text = re.sub(r"\\[nr]|\\(?=/)|\s+", "", text).translate(_URL_SAFE).rstrip("=")
    return text + "=" * (-len(text) % 4)


def _unreadable(what: str) -> Refused:
    return Refused(400, "invalid_image", f"{what} is an image that cannot be purified")
