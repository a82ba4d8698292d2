"""The gateway's surface as an OpenAPI document, from which the fuzzer generates requests."""

from __future__ import annotations

from typing import Any

from gateway_kit import png, url

TEXT = {"type": "string", "maxLength": 40}
# One valid image, invalid ones, addresses that must not be fetched, and arbitrary values.
PNG = url(png(1))
REFERENCES = [
    PNG,
    PNG[:60],
    "data:image/png;base64,",
    "data:text/plain,hi",
    "http://127.0.0.1/x.png",
    "file:///etc/passwd",
]
REFERENCE = {"anyOf": [{"enum": REFERENCES}, TEXT]}


def _object(required: list[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": required, "properties": properties}


def _list(items: Any) -> dict[str, Any]:
    return {"type": "array", "items": items, "maxItems": 3}


def _part(kind: str, **properties: Any) -> dict[str, Any]:
    return _object(["type", *properties], type={"enum": [kind]}, **properties)


ANYTHING = _object([], type=TEXT)
CHAT_PART = {
    "anyOf": [_part("text", text=TEXT), _part("image_url", image_url=_object(["url"], url=REFERENCE)), ANYTHING]
}
INPUT_PART = {"anyOf": [_part("input_text", text=TEXT), _part("input_image", image_url=REFERENCE), ANYTHING]}
SOURCE = {
    "anyOf": [
        _object(["type", "data"], type={"enum": ["base64"]}, data={"anyOf": [{"enum": [PNG[22:]]}, TEXT]}),
        _object(["type", "url"], type={"enum": ["url"]}, url=REFERENCE),
    ]
}
BLOCK = {"anyOf": [_part("text", text=TEXT), _part("image", source=SOURCE), ANYTHING]}
RESULT = _part("tool_result", tool_use_id=TEXT, content=_list(BLOCK))
ROLE = {"enum": ["user", "assistant", "system"]}


def _message(part: Any) -> dict[str, Any]:
    return _object(["role", "content"], role=ROLE, content={"anyOf": [TEXT, _list(part)]})


BODIES = {
    "/v1/chat/completions": _object(
        ["messages"], model=TEXT, messages=_list(_message(CHAT_PART)), stream={"type": "boolean"}
    ),
    "/v1/responses": _object(["input"], model=TEXT, input={"anyOf": [TEXT, _list(_message(INPUT_PART))]}),
    "/v1/messages": _object(["messages"], system=TEXT, messages=_list(_message({"anyOf": [BLOCK, RESULT]}))),
    "/v1/embeddings": _object([], input={"anyOf": [TEXT, _list(TEXT), _list({"type": "integer"})]}),
    "/page/purify": _object(["image"], image=REFERENCE),
}
WORDS = {"type": "string", "minLength": 5}
OPENAI_ERROR = _object(["error"], error=_object(["message", "type", "code"], message=WORDS))
CLAUDE_ERROR = _object(["type", "error"], type={"enum": ["error"]}, error=_object(["message", "type"], message=WORDS))
REFUSALS = ("400", "403", "404", "405", "408", "413", "415", "422", "429", "503")


def document() -> dict[str, Any]:
    """OpenAPI 3.1: every route, every status that it may answer with, and the form of its refusals."""
    paths: dict[str, Any] = {}
    for path, body in BODIES.items():
        error = {"application/json": {"schema": CLAUDE_ERROR if path == "/v1/messages" else OPENAI_ERROR}}
        answers: dict[str, Any] = {"200": {"description": "passed on", "content": {"application/json": {}}}}
        answers |= {status: {"description": "refused", "content": error} for status in REFUSALS}
        content = {"application/json": {"schema": body}}
        paths[path] = {"post": {"requestBody": {"required": True, "content": content}, "responses": answers}}
    for path in ("/healthz", "/readyz", "/page/info"):
        paths[path] = {"get": {"responses": {"200": {"description": "ok", "content": {"application/json": {}}}}}}
    return {"openapi": "3.1.0", "info": {"title": "CoDefend gateway", "version": "1"}, "paths": paths}
