"""PDF files in requests: where they are, and the parts that stand in their place. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from codefend.gateway.errors import Api, Refused
from codefend.gateway.suspicion import Place, check_keys, expect_object, expect_text, unknown

Documents = Literal["pages", "refuse"]

_PARTS: dict[Api, str] = {"chat": "file", "responses": "input_file", "messages": "document"}
_TEXT: dict[Api, str] = {"chat": "text", "responses": "input_text", "messages": "text"}


def pdf_reference(api: Api, part: dict[str, Any], place: Place) -> str | None:
    """The data URL or base64 of a PDF part; None for a part of another type or a document without a file.

    Raises Refused (400) for a file that is named by an id or an address instead of sent, and for other media types.
    """
    if part.get("type") != _PARTS.get(api):
        return None
    if api == "messages":
        source, here = expect_object(part.get("source"), (*place, "source")), (*place, "source")
        if source.get("type") in ("text", "content"):
            return None
        if source.get("type") != "base64" or source.get("media_type") != "application/pdf":
            raise unknown("document source", source.get("media_type") or source.get("type"), here)
        check_keys(part, frozenset({"source", "title", "context"}), place)
        check_keys(source, frozenset({"media_type", "data"}), here)
        _check_titles(part, place)
        return expect_text(source.get("data"), (*here, "data"))
    file, here = part, place
    if api == "chat":
        check_keys(part, frozenset({"file"}), place)
        file, here = expect_object(part.get("file"), (*place, "file")), (*place, "file")
    check_keys(file, frozenset({"filename", "file_data", "detail"}), here)
    _check_titles(file, here)
    return expect_text(file.get("file_data"), (*here, "file_data"))


def _check_titles(part: dict[str, Any], place: Place) -> None:
    for key in ("filename", "title", "context"):
        if part.get(key) is not None:
            expect_text(part[key], (*place, key))


def page_parts(api: Api, part: dict[str, Any], pages: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """What replaces a PDF part: its name and context as text, if it has any, and an image for each page.

    ``pages`` are media types and base64. A cache breakpoint moves to the last page; citations need the text and go.
    """
    named = part["file"] if api == "chat" else part
    texts = [named[key] for key in ("filename", "title", "context") if named.get(key)]
    parts: list[dict[str, Any]] = [{"type": _TEXT[api], "text": "\n".join(texts)}] if texts else []
    parts += [_image(api, media_type, data) for media_type, data in pages]
    parts[-1] |= {key: part[key] for key in ("cache_control", "prompt_cache_breakpoint") if key in part}
    return parts


def _image(api: Api, media_type: str, data: str) -> dict[str, Any]:
    if api == "messages":
        return {"type": "image", "source": {"type": "base64", "media_type": media_type, "data": data}}
    url = f"data:{media_type};base64,{data}"
    if api == "responses":
        return {"type": "input_image", "image_url": url, "detail": "auto"}
    return {"type": "image_url", "image_url": {"url": url}}


def rename(refusal: Refused) -> Refused:
    """A refusal of an image's bytes, worded for a document."""
    message = refusal.message.replace("image/...", "application/pdf").replace("an image", "a document")
    code = refusal.code.replace("image", "document")
    return Refused(refusal.status, code, message.replace("the image", "the document"))
