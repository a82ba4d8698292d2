"""Checks on the parts of a request: known keys only, and nothing that looks like an image where none belongs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from codefend.gateway.errors import Refused

Place = tuple[str | int, ...]  # keys and indices from the root of the body

# What any part may hold beside what its type needs.
_BESIDE = frozenset({"type", "cache_control", "citations", "annotations", "logprobs"})

# Values of these keys describe tools or are kept as text; their own keys may be called anything.
_FREE = frozenset({"tools", "functions", "response_format", "text", "metadata", "tool_choice", "output_config"})
_MEDIA_NAMES = (
    "image images image_url input_image image_file image_embeds video videos video_url input_video file input_file "
    "file_id file_data multi_modal_data mm_data pixel_values prompt_embeds inline_data inlinedata"
)
_MEDIA_KEYS = frozenset(_MEDIA_NAMES.split())
_MEDIA_TYPES = _MEDIA_KEYS | {"document", "computer_screenshot"}
_MAGIC64 = ("iVBORw0KGgo", "/9j/", "R0lGODlh", "R0lGODdh", "UklGR", "SUkqA", "TU0AK")
_DATA_URL = re.compile(r"data:[^,\s]*,", re.IGNORECASE)
_LONG = 512  # characters: shorter base64 is no picture worth hiding


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
    stack: list[tuple[Any, Place]] = [(value, place)]
    while stack:
        here, at = stack.pop()
        if isinstance(here, str):
            if _looks_like_image(here):
                raise Refused(400, "unknown_content", "an image where none is expected", where=spell(at))
        elif isinstance(here, list):
            stack += [(inner, (*at, i)) for i, inner in enumerate(here) if isinstance(inner, (str, list, dict))]
        elif isinstance(here, dict):
            for key, inner in here.items():
                typed = key == "type" and isinstance(inner, str) and inner in _MEDIA_TYPES
                if not free and (typed or key.casefold() in _MEDIA_KEYS):
                    what = inner if typed else key
                    raise Refused(400, "unknown_content", f"{what!r} may hold an image here", where=spell((*at, key)))
                if isinstance(inner, (str, list, dict)):
                    stack.append((inner, (*at, key)))


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
