"""Checks on the parts of a request: known keys only, and nothing that looks like an image where none belongs."""

from __future__ import annotations

import binascii
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from codefend.gateway.errors import Refused

Place = tuple[str | int, ...]  # keys and indices from the root of the body

# What any part may hold beside what its type needs.
_BESIDE = frozenset({"type", "cache_control", "citations", "annotations", "logprobs"})

# Values of these keys describe tools or are kept as text; their own keys may be called anything.
_FREE = frozenset({"tools", "functions", "response_format", "text", "metadata", "tool_choice", "output_config"})
_MEDIA_NAMES = (
    "image images image_url input_image image_file image_embeds video videos video_url input_video file input_file "
    "file_id file_data filedata multi_modal_data multimodal_data mm_data image_data video_data pixel_values "
    "prompt_embeds inline_data inlinedata document_url"
)
_MEDIA_KEYS = frozenset(_MEDIA_NAMES.split())
_MEDIA_TYPES = _MEDIA_KEYS | {"document", "computer_screenshot"}
_MAGIC64 = ("iVBORw0KGgo", "/9j/", "R0lGODlh", "R0lGODdh", "UklGR", "SUkqA", "TU0AK")
_DATA_URL = re.compile(r"data:[^,\s]*,", re.IGNORECASE)
_LONG = 512  # characters: shorter base64 is no picture worth hiding
_DEEPEST = 100  # lists and objects in one another; no API needs more than some twenty

# "![alt](URL" and "<img src=URL". An alternative text ends at the next "![" and a tag at the next "<", and nothing is
# given back (*+): linear in whatever text. Long texts are read in steps, between which the event loop can go on; one
# image may be as long as they overlap.
_WRITTEN = r"(?:!\[[^\]!]*+(?:!(?!\[)[^\]!]*+)*+\]\(\s*+<?|<img\b[^<>]*?\bsrc\s*+=[\s\"']*+)"
_WRITTEN_DATA = re.compile(f"{_WRITTEN}data:", re.IGNORECASE)
_WRITTEN_ANY = re.compile(f"{_WRITTEN}(?:data:|https?:)", re.IGNORECASE)
_STEP, _OVERLAP = 1 << 18, 1 << 16

# WAV, MP3, Ogg, FLAC, MP4 and WebM. The first bytes of MP4 are a length: more than 255 could begin a TGA picture.
_AUDIO = re.compile(
    rb"RIFF....WAVE|ID3|\xff[\xe0-\xff]|OggS|fLaC|\0\0\0.ftyp(?:M4[AB] |mp4[12]|iso[m2-9]|dash|3gp.)|\x1a\x45\xdf\xa3",
    re.DOTALL,
)


def search_rest(value: Mapping[str, Any], understood: set[str], place: Place) -> None:
    for key, inner in value.items():
        if key in understood:
            continue
        if key in _MEDIA_KEYS or key.casefold() in _MEDIA_KEYS:
            raise Refused(400, "unknown_content", f"{key!r} may hold an image here", where=spell((*place, key)))
        if not isinstance(inner, (int, float)):
            search(inner, (*place, key), free=key in _FREE)


def search(value: Any, place: Place, *, free: bool = False) -> None:
    """Refuse anything that looks like an image in ``value``; with ``free`` its keys may be called anything."""
    if isinstance(value, str) and _looks_like_image(value):
        raise _misplaced(place)
    for at, here in _containers(value, place):
        for step, inner in _items(here):
            typed = step == "type" and isinstance(inner, str) and inner in _MEDIA_TYPES
            if not free and (typed or (isinstance(step, str) and step.casefold() in _MEDIA_KEYS)):
                what = inner if typed else step
                raise Refused(400, "unknown_content", f"{what!r} may hold an image here", where=spell((*at, step)))
            if isinstance(inner, str) and _looks_like_image(inner):
                raise _misplaced((*at, step))


def check_texts(value: Any, *, image_links: bool) -> None:
    """Refuse images written into texts and keys as Markdown or HTML, which some servers turn into pictures.

    With ``image_links`` those at http(s) addresses pass. Raises Refused (400) for what is nested too deeply, too.
    """
    pattern = _WRITTEN_DATA if image_links else _WRITTEN_ANY
    if isinstance(value, str) and _found_in(value, pattern):
        raise _written(())
    for at, here in _containers(value, ()):
        for step, inner in _items(here):
            if (isinstance(inner, str) and _found_in(inner, pattern)) or (
                isinstance(step, str) and _found_in(step, pattern)
            ):
                raise _written((*at, step))
        if isinstance(here, list):  # servers join the texts of a message
            texts = [part["text"] for part in here if isinstance(part, dict) and isinstance(part.get("text"), str)]
            if len(texts) > 1 and _found_in("".join(texts), pattern):
                raise _written(at)


def _found_in(text: str, pattern: re.Pattern[str]) -> bool:
    return any(pattern.search(text, start, start + _STEP + _OVERLAP) for start in range(0, len(text), _STEP))


def _containers(value: Any, place: Place) -> Iterator[tuple[Place, Any]]:
    """Every list and object in ``value``, itself included, one place at a time. Raises Refused for too deep nesting."""
    waiting: list[Iterator[tuple[Place, Any]]] = [iter(((place, value),) if isinstance(value, (list, dict)) else ())]
    while waiting:
        found = next(waiting[-1], None)
        if found is None:
            waiting.pop()
            continue
        if len(found[0]) >= _DEEPEST:
            raise Refused(400, "invalid_json", f"the body is nested too deeply: the limit is {_DEEPEST} levels")
        yield found
        waiting.append(_inner(*found))


def _inner(place: Place, value: Any) -> Iterator[tuple[Place, Any]]:
    for step, inner in _items(value):
        if isinstance(inner, (list, dict)):
            yield (*place, step), inner


def _items(value: Any) -> Iterable[tuple[str | int, Any]]:
    return enumerate(value) if isinstance(value, list) else value.items()


def _misplaced(place: Place) -> Refused:
    return Refused(400, "unknown_content", "an image where none is expected", where=spell(place))


def _written(place: Place) -> Refused:
    message = "Markdown and HTML images in texts are not passed on here; send an image as a part of its own"
    return Refused(400, "unknown_content", message, where=spell(place))


def is_audio(text: str) -> bool:
    """Whether base64 begins as audio files do."""
    try:
        return _AUDIO.match(binascii.a2b_base64(text[:24], strict_mode=True)) is not None
    except ValueError:
        return False


def _looks_like_image(text: str) -> bool:
    head = text[:300].lstrip()
    if head[:5].lower() == "data:" and (_DATA_URL.match(head) or ";base64" in head.lower()):
        return True
    bitmap = head.startswith("Qk") and head[8:13] == "AAAAA"  # BMP: "BM", a size, four reserved zero bytes
    if len(text) < _LONG or not (bitmap or head.startswith(_MAGIC64)):
        return False
    return not any(c in " .,;:!?" for c in text[: _LONG // 2])  # base64 has none of these, prose has them soon


def check_case(value: Mapping[str, Any], known: set[str] | frozenset[str], place: Place) -> None:
    for key in value:
        if key not in known and key.casefold() in known:
            raise Refused(400, "unknown_content", f"unknown key {key!r}; write it in lower case", where=spell(place))


def check_keys(part: Mapping[str, Any], keys: frozenset[str], place: Place) -> None:
    for key in part:
        if key not in keys and key not in _BESIDE:
            kind = part.get("type", "this part")
            raise Refused(400, "unknown_content", f"unknown key {key[:60]!r} in {kind}", where=spell((*place, key)))
        if key in _BESIDE and key != "type":
            search(part[key], (*place, key), free=True)


def expect_list(body: Mapping[str, Any], key: str) -> list[Any]:
    value = body.get(key)
    if not isinstance(value, list):
        raise Refused(400, "invalid_request", f"{key} must be a list", where=key)
    return value


def expect_object(value: Any, place: Place) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Refused(400, "unknown_content", "expected an object", where=spell(place))
    return value


def expect_text(value: Any, place: Place) -> str:
    if not isinstance(value, str):
        raise Refused(400, "unknown_content", "expected text", where=spell(place))
    return value


def unknown(what: str, kind: Any, place: Place) -> Refused:
    named = repr(kind)[:60] if kind is not None else "without a type"
    message = f"{what} {named} cannot be inspected for images and is not passed on"
    return Refused(400, "unknown_content", message, where=spell(place))


def spell(place: Place) -> str:
    """Write a place as ``messages[0].content[1]``."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step[:40]}" for step in place)
    return text.removeprefix(".")
