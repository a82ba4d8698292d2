"""Where the images of a request are: chat completions, responses, Anthropic messages, lists of texts. Pure functions.

What is not understood is refused, never passed on unseen: a part of unknown type, an unknown key beside an image, a
key that differs from a known one in upper and lower case only (Go's parser takes them for equal), or anything that
looks like an image where none belongs: in other fields, in audio, or written into a text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from codefend.gateway.documents import Documents, pdf_reference
from codefend.gateway.errors import Api, Refused
from codefend.gateway.suspicion import (
    Place,
    check_addresses,
    check_case,
    check_keys,
    check_texts,
    check_tool_list,
    check_tools,
    expect_list,
    expect_object,
    expect_text,
    is_audio,
    search,
    search_rest,
    spell,
    unknown,
)


@dataclass(frozen=True)
class Slot:
    """One image: where it stands, what it says, and how it is written there."""

    place: Place
    reference: str  # a data URL, a remote URL, or bare base64
    # a URL string, an Anthropic source object, a base64 string; a part with a PDF, and a page of that part
    form: Literal["url", "source", "base64", "document", "page"]
    data: bytes = field(default=b"", repr=False)  # a page's file; the others' is in the reference


@dataclass(frozen=True)
class Turn:
    """The content of one message of the user's."""

    place: Place
    has_image: bool


@dataclass(frozen=True)
class Survey:
    api: Api
    slots: tuple[Slot, ...]
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class Inspection:
    """What the operator allows besides images in their places.

    With ``image_links`` http(s) images in Markdown and HTML pass, as text for a server that does not load them.
    ``tools`` names tools that load content on the server's side, where no image is purified.
    """

    image_links: bool = False
    tools: tuple[str, ...] = ()
    documents: Documents = "refuse"  # "pages": PDF parts are slots


def survey(api: Api, body: Any, inspection: Inspection | None = None) -> Survey:
    """Find every image. Raises Refused (400) when something in the body is not understood or hides an image."""
    inspection = inspection or Inspection()
    check_texts(body, image_links=inspection.image_links)
    if api == "other":
        search(body, ())
        return Survey(api, (), ())
    if not isinstance(body, dict):
        raise Refused(400, "invalid_request", "the body must be a JSON object")
    check_tools(body, inspection.tools)
    collected = _Collected(inspection.documents, inspection.tools)
    if api == "texts":
        check_addresses(body, image_links=inspection.image_links)
        search_rest(body, set(), ())
    else:
        _SHAPES[api](body, collected)
    return Survey(api, tuple(collected.slots), tuple(collected.turns))


@dataclass
class _Collected:
    documents: Documents = "refuse"
    tools: tuple[str, ...] = ()
    slots: list[Slot] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)


# What a part may hold beside its type. A key that is missing here is refused.
_TEXT_PARTS: dict[Api, dict[str, frozenset[str]]] = {
    "chat": {
        "text": frozenset({"text"}),
        "refusal": frozenset({"refusal"}),
        "input_audio": frozenset({"input_audio"}),
    },
    "responses": {
        "input_text": frozenset({"text"}),
        "output_text": frozenset({"text"}),
        "text": frozenset({"text"}),
        "summary_text": frozenset({"text"}),
        "reasoning_text": frozenset({"text"}),
        "refusal": frozenset({"refusal"}),
        "input_audio": frozenset({"input_audio"}),
    },
    "messages": {
        "text": frozenset({"text"}),
        "thinking": frozenset({"thinking", "signature"}),
        "redacted_thinking": frozenset({"data"}),
        "tool_use": frozenset({"id", "name", "input", "caller", "toolset_name"}),
        "server_tool_use": frozenset({"id", "name", "input", "caller"}),
        "mcp_tool_use": frozenset({"id", "name", "input", "server_name"}),
        "tool_reference": frozenset({"tool_name"}),
        "compaction": frozenset({"content", "encrypted_content", "signature", "tool_changes"}),
    },
}
TURN_TEXT: dict[Api, str] = {"chat": "text", "responses": "input_text", "messages": "text"}
_CONTENT_KEYS = frozenset({"role", "content", "type"})


def _chat(body: dict[str, Any], into: _Collected) -> None:
    check_case(body, {"messages"}, ())
    _turns("chat", body, {"role", "content", "tool_calls", "function_call"}, into)
    search_rest(body, {"messages"}, ())


def _responses(body: dict[str, Any], into: _Collected) -> None:
    check_case(body, {"input", "instructions", "prompt"}, ())
    items = body.get("input")
    if isinstance(items, str):
        into.turns.append(Turn(("input",), False))
    elif items is not None:
        for i, item in enumerate(expect_list(body, "input")):
            _item(expect_object(item, ("input", i)), ("input", i), into)
    search_rest(body, {"input"}, ())


def _messages(body: dict[str, Any], into: _Collected) -> None:
    check_case(body, {"messages", "system"}, ())
    system = body.get("system")
    if system is not None:
        _content("messages", system, ("system",), into)
    _turns("messages", body, {"role", "content"}, into)
    search_rest(body, {"messages", "system"}, ())


def _turns(api: Api, body: dict[str, Any], keys: set[str], into: _Collected) -> None:
    """The messages of a conversation; other ``keys`` than these are searched."""
    for i, message in enumerate(expect_list(body, "messages")):
        place: Place = ("messages", i)
        expect_object(message, place)
        check_case(message, _CONTENT_KEYS, place)
        _turn(api, message, place, into)
        search_rest(message, keys, place)


def _turn(api: Api, message: Mapping[str, Any], place: Place, into: _Collected) -> None:
    before, here, content = len(into.slots), (*place, "content"), message.get("content")
    _content(api, content, here, into)
    if message.get("role") == "user" and content is not None:
        into.turns.append(Turn(here, len(into.slots) > before))


def _image(body: dict[str, Any], into: _Collected) -> None:
    """The page's own: ``{"image": data URL}``."""
    if set(body) != {"image"} or not isinstance(body["image"], str):
        raise Refused(400, "invalid_request", 'expected {"image": "data:image/...;base64,..."}')
    into.slots.append(Slot(("image",), body["image"], "url"))


_SHAPES: dict[Api, Callable[[dict[str, Any], _Collected], None]] = {
    "image": _image,
    "chat": _chat,
    "responses": _responses,
    "messages": _messages,
}

_TEXT_ITEM_NAMES = (
    "function_call custom_tool_call reasoning item_reference web_search_call file_search_call computer_call mcp_call "
    "mcp_list_tools mcp_approval_request mcp_approval_response local_shell_call local_shell_call_output shell_call "
    "shell_call_output apply_patch_call apply_patch_call_output code_interpreter_call compaction"
)
_TEXT_ITEMS = frozenset(_TEXT_ITEM_NAMES.split())


def _item(item: dict[str, Any], place: Place, into: _Collected) -> None:
    """One item of ``input`` in the responses API."""
    kind = item.get("type", "message" if "role" in item else None)
    check_case(item, _CONTENT_KEYS | {"output", "result"}, place)
    if not isinstance(kind, str):
        raise unknown("input item", kind, place)
    if kind == "message":
        _turn("responses", item, place, into)
        search_rest(item, {"content"}, place)
    elif kind in ("function_call_output", "custom_tool_call_output"):
        _content("responses", item.get("output"), (*place, "output"), into)
        search_rest(item, {"output"}, place)
    elif kind == "computer_call_output":
        shot = expect_object(item.get("output"), (*place, "output"))
        _image_part("responses", shot, (*place, "output"), into)
        search_rest(item, {"output"}, place)
    elif kind == "image_generation_call":
        if item.get("result") is not None:
            into.slots.append(Slot((*place, "result"), expect_text(item["result"], (*place, "result")), "base64"))
        search_rest(item, {"result"}, place)
    elif kind in ("tool_search_call", "tool_search_output"):
        check_case(item, {"tools"}, place)
        check_tool_list(item, into.tools, place)
        search(item, place, free=True)
    elif kind in _TEXT_ITEMS:
        rest = {key: value for key, value in item.items() if key not in ("arguments", "input", "content", "summary")}
        search(rest, place, free=kind != "code_interpreter_call")  # of these, only code can have drawn an image
        for key in ("content", "summary"):
            if item.get(key) is not None:
                _content("responses", item[key], (*place, key), into)
    else:
        raise unknown("input item", kind, place)


def _content(api: Api, content: Any, place: Place, into: _Collected) -> None:
    """The content of a message or the output of a tool: text, nothing, or a list of parts."""
    if content is None or isinstance(content, str):
        return
    if not isinstance(content, list):
        raise Refused(400, "unknown_content", "content must be text or a list of parts", where=spell(place))
    for i, part in enumerate(content):
        _part(api, expect_object(part, (*place, i)), (*place, i), into)


def _part(api: Api, part: dict[str, Any], place: Place, into: _Collected) -> None:
    kind = part.get("type")
    if not isinstance(kind, str):
        raise unknown("content part", kind, place)
    text_keys = _TEXT_PARTS[api].get(kind)
    if text_keys is not None:
        check_keys(part, text_keys, place)
        for key in text_keys - {"input", "input_audio"}:
            if key in ("text", "refusal", "thinking") or (key == "content" and part.get(key) is not None):
                expect_text(part.get(key), (*place, key))
            elif key == "tool_changes" and part.get(key):
                raise unknown("setting", key, place)
            elif key in part:
                search(part[key], (*place, key))
        if kind == "input_audio":
            _audio(part.get(kind), (*place, kind))
    elif into.documents == "pages" and (pdf := pdf_reference(api, part, place)) is not None:
        into.slots.append(Slot(place, pdf, "document"))
    elif kind in _IMAGE_PARTS[api]:
        _image_part(api, part, place, into)
    elif api == "messages" and kind in _NESTED_BLOCKS:
        check_keys(part, _NESTED_BLOCKS[kind], place)
        _content("messages", part.get("content"), (*place, "content"), into)
        search_rest(part, {"content"}, place)
    elif api == "messages" and kind == "document":
        _document(part, place, into)
    elif api == "messages" and kind == "web_fetch_tool_result":
        _fetched(part, place, into)
    elif api == "messages" and kind in _SERVER_RESULTS:
        _check_viewed(part, place)
        search_rest(part, set(), place)
    else:
        raise unknown("content part", kind, place)


_IMAGE_PARTS: dict[Api, frozenset[str]] = {
    "chat": frozenset({"image_url"}),
    "responses": frozenset({"input_image"}),
    "messages": frozenset({"image"}),
}
_NESTED_BLOCKS = {
    "tool_result": frozenset({"tool_use_id", "content", "is_error", "toolset_name"}),
    "mcp_tool_result": frozenset({"tool_use_id", "content", "is_error"}),
    "search_result": frozenset({"source", "title", "content"}),
}
_SERVER_RESULT_NAMES = (
    "web_search_tool_result code_execution_tool_result bash_code_execution_tool_result "
    "text_editor_code_execution_tool_result tool_search_tool_result mcp_tool_listing"
)
_SERVER_RESULTS = frozenset(_SERVER_RESULT_NAMES.split())


def _fetched(part: dict[str, Any], place: Place, into: _Collected) -> None:
    """The page that a server has fetched: text passes, a PDF is refused, since no page parts can stand in its place."""
    check_case(part, {"content"}, place)
    result, here = part.get("content"), (*place, "content")
    if isinstance(result, dict) and result.get("type") == "web_fetch_result":
        check_case(result, {"content"}, here)
        document, there = expect_object(result.get("content"), (*here, "content")), (*here, "content")
        if document.get("type") != "document":
            raise unknown("content part", document.get("type"), there)
        _document(document, there, into)
        search_rest(result, {"content"}, here)
        search_rest(part, {"content"}, place)
    else:
        search_rest(part, set(), place)


def _check_viewed(part: dict[str, Any], place: Place) -> None:
    """A file that was looked at on the server must be text."""
    check_case(part, {"content"}, place)
    result, here = part.get("content"), (*place, "content")
    if isinstance(result, dict):
        check_case(result, {"file_type"}, here)
        if result.get("file_type") not in (None, "text"):
            raise unknown("viewed file", result["file_type"], here)


def _audio(value: Any, place: Place) -> None:
    """Some servers decode as an image whatever is no audio to them."""
    audio = expect_object(value, place)
    check_keys(audio, frozenset({"data", "format"}), place)
    if not is_audio(expect_text(audio.get("data"), (*place, "data"))):
        message = "this is not base64 of WAV, MP3, Ogg, FLAC, MP4 or WebM audio"
        raise Refused(400, "unknown_content", message, where=spell((*place, "data")))


def _image_part(api: Api, part: dict[str, Any], place: Place, into: _Collected) -> None:
    if api == "messages":
        check_keys(part, frozenset({"source"}), place)
        into.slots.append(_source(expect_object(part.get("source"), (*place, "source")), (*place, "source")))
        return
    keys = {"image_url", "detail", "file_id"} if api == "responses" else {"image_url"}
    check_keys(part, frozenset(keys), place)
    if part.get("file_id") is not None:
        raise Refused(400, "unknown_content", "an image by the id of a file is not read", where=spell(place))
    value, here = part.get("image_url"), (*place, "image_url")
    search(part.get("detail"), (*place, "detail"))
    if api == "chat" and isinstance(value, dict):
        check_keys(value, frozenset({"url", "detail"}), here)
        search(value.get("detail"), (*here, "detail"))
        value, here = value.get("url"), (*here, "url")
    into.slots.append(Slot(here, expect_text(value, here), "url"))


def _source(source: dict[str, Any], place: Place) -> Slot:
    """The ``source`` of an Anthropic image block."""
    if source.get("type") == "base64":
        check_keys(source, frozenset({"media_type", "data"}), place)
        return Slot(place, expect_text(source.get("data"), (*place, "data")), "source")
    if source.get("type") == "url":
        check_keys(source, frozenset({"url"}), place)
        return Slot(place, expect_text(source.get("url"), (*place, "url")), "source")
    raise unknown("image source", source.get("type"), place)


def _document(part: dict[str, Any], place: Place, into: _Collected) -> None:
    """Plain text passes, blocks are looked into; a PDF can hold any image and is refused."""
    check_keys(part, frozenset({"source", "title", "context"}), place)
    source, here = expect_object(part.get("source"), (*place, "source")), (*place, "source")
    if source.get("type") == "text":
        check_keys(source, frozenset({"media_type", "data"}), here)
        if source.get("media_type") != "text/plain":
            raise unknown("document media type", source.get("media_type"), here)
    elif source.get("type") == "content":
        check_keys(source, frozenset({"content"}), here)
        _content("messages", source.get("content"), (*here, "content"), into)
    else:
        raise unknown("document source", source.get("type"), here)
