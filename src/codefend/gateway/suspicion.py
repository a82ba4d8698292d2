"""Checks on the parts of a request: known keys only, and nothing that looks like an image where none belongs."""

from __future__ import annotations

import binascii
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from codefend.gateway.errors import Refused

Place = tuple[str | int, ...]  # keys and indices from the root of the body

# What any part may hold besides what its type needs.
_BESIDE = frozenset({"type", "cache_control", "prompt_cache_breakpoint", "citations", "annotations", "logprobs"})

# Values of these keys describe tools or stay text; their own keys may have any name.
_FREE = frozenset({"tools", "functions", "response_format", "text", "metadata", "tool_choice", "output_config"})
_MEDIA_NAMES = (
    "image images image_url input_image image_file image_embeds video videos video_url input_video file input_file "
    "file_id file_data filedata multi_modal_data multimodal_data mm_data image_data video_data pixel_values "
    "prompt_embeds inline_data inlinedata document_url ref_image ref_images reference_images init_image mask_image "
    "image_base64 b64_json"
)
_MEDIA_TYPES = frozenset(_MEDIA_NAMES.split()) | {"document", "computer_screenshot"}
_MEDIA_KEYS = frozenset(name.replace("_", "") + plural for name in _MEDIA_NAMES.split() for plural in ("", "s"))
# PNG, JPEG (also in the alphabet of URLs), GIF, WebP, TIFF, JPEG XL, JPEG 2000, PSD, HDR, ICO, QOI, PDF
_MAGIC64 = (
    *("iVBORw0KGgo", "/9j/", "_9j_", "R0lGODlh", "R0lGODdh", "UklGR", "SUkqA", "SUkrA", "TU0AK", "AAAADEpYTCAN"),
    *("AAAADGpQICAN", "OEJQUw", "Iz9SQURJ", "AAABAA", "cW9pZg", "JVBERi0"),
)
_DATA_URL = re.compile(r"data:[^,\s]*,", re.IGNORECASE)
_LONG = 512  # characters: shorter base64 is no image worth hiding
_DEEPEST = 100  # lists and objects in one another; no API needs more than some twenty

# "![alt](URL", "<img src=URL" and the tags of Qwen-VL and ms-swift, "<img>URL, path or base64</img>". An alternative
# text ends at the next "![" and a tag at the next "<", and nothing is given back (*+): linear in whatever text. Long
# texts are read in steps, between which the event loop can go on; one image may be as long as they overlap.
_WRITTEN = r"(?:!\[[^\]!]*+(?:!(?!\[)[^\]!]*+)*+\]\(\s*+<?|<img\b[^<>]*?\bsrc\s*+=[\s\"']*+)"
_TAG = r"<(?:img|image|video)\s*+>\s*+"
_TAG_CONTENT = (
    r"(?:(?!https?:)\w++[+.-]*+://|data:|(?:[A-Za-z0-9+/=_-]\s{0,8}+){256}"
    r"|(?!https?:)[^\s<][^<]{0,4096}+</(?:img|image|video))"
)
# What is still open after 60,000 characters could be closed beyond that overlap, and is refused as it is.
_OPEN = r"!\[(?:[^\]!]|!(?!\[)){60000}+|<img\b[^<>]{60000}+"
_WRITTEN_DATA = re.compile(f"{_WRITTEN}data:|{_TAG}{_TAG_CONTENT}|{_OPEN}", re.IGNORECASE)
_WRITTEN_ANY = re.compile(f"{_WRITTEN}(?:data:|https?:)|{_TAG}(?:https?:|{_TAG_CONTENT})|{_OPEN}", re.IGNORECASE)
_STEP, _OVERLAP = 1 << 18, 1 << 16

# WAV, MP3, Ogg, FLAC, MP4 and WebM. The first bytes of MP4 are a length: more than 255 could begin a TGA image.
_AUDIO = re.compile(
    rb"RIFF....WAVE|ID3|\xff[\xe0-\xff]|OggS|fLaC|\0\0\0.ftyp(?:M4[AB] |mp4[12]|iso[m2-9]|dash|3gp.)|\x1a\x45\xdf\xa3",
    re.DOTALL,
)


def search_rest(value: Mapping[str, Any], understood: set[str], place: Place) -> None:
    for key, inner in value.items():
        if key in understood:
            continue
        if _names_media(key):
            raise Refused(400, "unknown_content", f"{key!r} may hold an image here", where=spell((*place, key)))
        if not isinstance(inner, (int, float)):
            search(inner, (*place, key), free=key in _FREE)


def _names_media(key: str) -> bool:
    """Whether a key is one of media, however it is spelt: ``image_url``, ``imageUrls``, ``Image-URL``."""
    return key.casefold().replace("_", "").replace("-", "") in _MEDIA_KEYS


def search(value: Any, place: Place, *, free: bool = False) -> None:
    """Refuse anything that looks like an image in ``value``; with ``free`` its keys may be called anything."""
    if isinstance(value, str) and _looks_like_image(value):
        raise _misplaced(place)
    for at, here in _containers(value, place):
        for step, inner in _items(here):
            typed = step == "type" and isinstance(inner, str) and inner in _MEDIA_TYPES
            if not free and (typed or (isinstance(step, str) and _names_media(step))):
                what = inner if typed else step
                raise Refused(400, "unknown_content", f"{what!r} may hold an image here", where=spell((*at, step)))
            if isinstance(inner, str) and _looks_like_image(inner):
                raise _misplaced((*at, step))


def check_texts(value: Any, *, image_links: bool) -> None:
    """Refuse images written into texts and keys as Markdown or HTML, which some servers load as images.

    With ``image_links`` those at http(s) addresses pass. Raises Refused (400) for what is nested too deeply, too.
    """
    pattern = _WRITTEN_DATA if image_links else _WRITTEN_ANY
    if isinstance(value, str) and _contains(value, pattern):
        raise _written(())
    for at, here in _containers(value, ()):
        for step, inner in _items(here):
            if (isinstance(inner, str) and _contains(inner, pattern)) or (
                isinstance(step, str) and _contains(step, pattern)
            ):
                raise _written((*at, step))
        if isinstance(here, list):  # servers join the texts of a message
            texts = [part["text"] for part in here if isinstance(part, dict) and isinstance(part.get("text"), str)]
            if len(texts) > 1 and _contains("".join(texts), pattern):
                raise _written(at)


_ADDRESS = re.compile(r"\s*+(?:https?|file|s3|gs)://\S++\s*+\Z", re.IGNORECASE)


def check_addresses(body: Mapping[str, Any], *, image_links: bool) -> None:
    """Refuse what a multimodal embedding or reranking server loads as an image: objects, and texts that are addresses.

    Without ``image_links`` a text that is nothing but an http(s) address counts.
    """
    for key, value in body.items():
        for at, here in _containers(value, (key,)):
            if isinstance(here, dict) and key != "metadata":
                raise Refused(400, "unknown_content", "expected texts or numbers, not objects", where=spell(at))
            for step, inner in _items(here):
                if isinstance(inner, str) and not image_links and _ADDRESS.match(inner):
                    raise _address((*at, step))
        if isinstance(value, str) and not image_links and _ADDRESS.match(value):
            raise _address((key,))


def _address(place: Place) -> Refused:
    message = "a text that is an address may be loaded as an image and is not passed on here"
    return Refused(400, "unknown_content", message, where=spell(place))


# Tools that run where the request comes from, or that load nothing. Any other tool works on the server's side.
_CLIENT_TOOLS = (
    "function custom namespace computer computer_use_preview local_shell shell apply_patch bash text_editor memory "
    "image_generation tool_search str_replace_based_edit_tool"
)
_CLIENT_TOOL = re.compile(f"(?:{'|'.join(_CLIENT_TOOLS.split())})(?:_\\d{{8}})?\\Z")
_SERVER_KEYS = {
    "mcp_servers": "mcp",
    "web_search_options": "web_search",
    "plugins": "plugins",
    "container": "code_execution",
    "search_parameters": "web_search",  # xAI
    "enable_search": "web_search",  # Qwen
    "data_sources": "data_sources",  # Azure
    "connectors": "connectors",
    "vector_store_ids": "file_search",  # LiteLLM
}


def check_tools(body: Mapping[str, Any], allowed: Sequence[str]) -> None:
    """Refuse tools by which the server loads content itself, images included, unless the operator allows them by name.

    A name stands for its dated versions, too: ``web_fetch`` allows ``web_fetch_20250910``.
    """
    check_case(body, {"tools", *_SERVER_KEYS}, ())
    check_tool_list(body, allowed, ())
    for key, name in _SERVER_KEYS.items():
        if body.get(key) and not _is_allowed(name, allowed):
            raise _server_tool(name, (key,))


def check_tool_list(holder: Mapping[str, Any], allowed: Sequence[str], place: Place) -> None:
    """As `check_tools`, for the list at ``tools`` alone and those of its namespaces; a mask of an image is refused."""
    tools = holder.get("tools")
    for i, tool in enumerate(tools if isinstance(tools, list) else ()):
        here = (*place, "tools", i)
        check_case(expect_object(tool, here), {"type", "tools", "input_image_mask"}, here)
        kind = tool.get("type", "function" if {"function", "name"} & tool.keys() else None)
        if not isinstance(kind, str):
            raise unknown("tool", kind, here)
        if not _CLIENT_TOOL.match(kind) and not _is_allowed(kind, allowed):
            raise _server_tool(kind, here)
        if "input_image_mask" in tool:
            raise unknown("tool setting", "input_image_mask", here)
        if kind == "namespace":
            check_tool_list(tool, allowed, here)


def _is_allowed(kind: str, allowed: Sequence[str]) -> bool:
    return any(kind == name or kind.startswith(f"{name}_") for name in allowed)


def _server_tool(kind: str, place: Place) -> Refused:
    message = f"the tool {kind[:60]!r} loads content on the server's side, where no image is purified (--allow-tools)"
    return Refused(400, "tool_refused", message, where=spell(place))


def _contains(text: str, pattern: re.Pattern[str]) -> bool:
    return any(pattern.search(text, start, start + _STEP + _OVERLAP) for start in range(0, len(text), _STEP))


def _containers(value: Any, place: Place) -> Iterator[tuple[Place, Any]]:
    """Every list and object in ``value``, itself included, one place at a time. Raises Refused for too deep nesting."""
    waiting: list[Iterator[tuple[Place, Any]]] = [iter(((place, value),) if isinstance(value, (list, dict)) else ())]
    while waiting:
        container = next(waiting[-1], None)
        if container is None:
            waiting.pop()
            continue
        if len(container[0]) >= _DEEPEST:
            raise Refused(400, "invalid_json", f"the body is nested too deeply: the limit is {_DEEPEST} levels")
        yield container
        waiting.append(_inner(*container))


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
        return is_audio_file(binascii.a2b_base64(text[:24], strict_mode=True))
    except ValueError:
        return False


def is_audio_file(data: bytes) -> bool:
    """Whether a file begins as audio files do: WAV, MP3, Ogg, FLAC, MP4, WebM."""
    return _AUDIO.match(data) is not None


def _looks_like_image(text: str) -> bool:
    head = text[:300].lstrip()
    if head[:5].lower() == "data:" and (_DATA_URL.match(head) or ";base64" in head.lower()):
        return True
    bitmap = head.startswith("Qk") and head[8:13] == "AAAAA"  # BMP: "BM", a size, four reserved zero bytes
    boxes = head.startswith("AAAA") and head[6:10] == "Z0eX"  # AVIF, HEIC, MP4: a length below 256, "ftyp"
    if len(text) < _LONG or not (bitmap or boxes or head.startswith(_MAGIC64)):
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
