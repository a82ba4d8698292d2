"""Uploaded files: images are purified, and so are those in the requests of a batch. Other files pass as they are.

An upload in parts is not inspected, so it is refused for images and batches.
"""

from __future__ import annotations

import asyncio
import base64
import re
from collections.abc import Callable, Sequence
from typing import Any

from codefend.gateway.engine import Caller, Engine, Terms
from codefend.gateway.errors import Refused
from codefend.gateway.forms import Part, read_form, replace_contents
from codefend.gateway.probe import InvalidHeader, is_other_image, read_header
from codefend.gateway.routes import api_of, check_path
from codefend.gateway.wire import check_simple, dump, parse

CheckRoute = Callable[[str, str], None]  # of method and path; raises Refused

FILES = "/v1/files"
UPLOADS = "/v1/uploads"
MESSAGE_BATCHES = "/v1/messages/batches"
_MAX_LINES = 50_000  # OpenAI's limit for a batch
_PURPOSE = re.compile(r"[a-z][a-z0-9_-]{0,63}\Z")
_INSPECTED = ("batch", "vision")  # how purposes begin whose files hold images: batch-api is Together's word for batch


async def rewrite_upload(
    engine: Engine, check_route: CheckRoute, content_type: str, raw: bytes, terms: Terms, caller: Caller
) -> bytes:
    """Purify the images of an upload to ``/v1/files``. Raises Refused."""
    form = read_form(content_type, raw)
    for part in form.parts:
        if part.is_file != (part.name.lower() == "file") or (part.is_file and part.name != "file"):
            raise Refused(400, "unknown_content", "the form's only file is the field file", where=part.name)
    named = [part for part in form.parts if part.name.lower().startswith("purpose")]  # Purpose and purpose[] as well
    purpose = _purpose([part.content.decode("utf-8", "replace") for part in named])
    is_batch = purpose.startswith("batch")
    contents: list[bytes] = []
    for part in form.parts:
        if not part.is_file:
            contents.append(part.content)
        elif is_batch:
            contents.append(await _rewrite_batch(engine, check_route, part, terms, caller))
        else:
            contents.append(await _rewrite_file(engine, part, terms, caller))
    return replace_contents(form, contents).write()


async def check_upload(raw: bytes) -> None:
    """Check the JSON body that begins an upload in parts. Raises Refused for images, batches and unclear purposes."""
    body = await asyncio.to_thread(_parse, raw)
    if not isinstance(body, dict):
        raise Refused(400, "invalid_request", "expected a JSON object")
    purpose = _purpose([value for key, value in body.items() if key.casefold() == "purpose"])
    if purpose.startswith(_INSPECTED):
        message = f"files for {purpose} are not passed on in parts, which cannot be inspected; send them to {FILES}"
        raise Refused(400, "uploads_refused", message, where="purpose")


def _purpose(values: Sequence[Any]) -> str:
    """The one purpose of an upload. Raises Refused for none, several, and spellings that servers may read otherwise."""
    if len(values) != 1 or not isinstance(values[0], str) or not _PURPOSE.match(values[0]):
        message = "expected one purpose in lower-case letters, like batch or vision"
        raise Refused(400, "invalid_request", message, where="purpose")
    return values[0]


async def _rewrite_file(engine: Engine, part: Part, terms: Terms, caller: Caller) -> bytes:
    try:
        read_header(part.content)
    except InvalidHeader as error:
        if is_other_image(part.content):
            raise Refused(
                400, "invalid_image", "an image of a kind that cannot be purified; send PNG or JPEG"
            ) from error
        if "is not an image" in str(error):
            return part.content
    image = (await engine.purify_file(part.content, terms, caller)).image
    caller.take(len(image.data))
    return base64.b64decode(image.data)


async def _rewrite_batch(engine: Engine, check_route: CheckRoute, part: Part, terms: Terms, caller: Caller) -> bytes:
    """One request a line: ``{"custom_id": ..., "method": ..., "url": ..., "body": {...}}``."""
    lines = [line for line in part.content.split(b"\n") if line.strip()]
    if len(lines) > _MAX_LINES:
        raise Refused(413, "body_too_complex", f"a batch of {len(lines):,} lines; the limit is {_MAX_LINES:,}")
    rewritten = []
    for number, line in enumerate(lines, start=1):
        try:
            rewritten.append(await _rewrite_line(engine, check_route, line, terms, caller))
        except Refused as refusal:
            where = f"line {number}" + (f": {refusal.where}" if refusal.where else "")
            raise refusal.at(where) from refusal
    return b"\n".join(rewritten) + b"\n"


async def _rewrite_line(engine: Engine, check_route: CheckRoute, line: bytes, terms: Terms, caller: Caller) -> bytes:
    request = await asyncio.to_thread(_parse, line)
    if not isinstance(request, dict) or set(request) != {"custom_id", "method", "url", "body"}:
        raise Refused(400, "invalid_request", "expected custom_id, method, url and body")
    method, url = request["method"], request["url"]
    if not isinstance(method, str) or not isinstance(url, str) or not isinstance(request["custom_id"], str):
        raise Refused(400, "invalid_request", "custom_id, method and url must be texts")
    check_path(url)
    check_route(method, url)
    outcome = await engine.rewrite(api_of(url), request["body"], terms, caller)
    return await asyncio.to_thread(dump, request if outcome.body is None else request | {"body": outcome.body})


async def rewrite_message_batch(engine: Engine, raw: bytes, terms: Terms, caller: Caller) -> bytes:
    """Purify the images of Anthropic's ``{"requests": [{"custom_id": ..., "params": {...}}]}``. Raises Refused."""
    body = await asyncio.to_thread(_parse, raw)
    requests = body.get("requests") if isinstance(body, dict) and set(body) == {"requests"} else None
    if not isinstance(requests, list):
        raise Refused(400, "invalid_request", 'expected {"requests": [...]}')
    rewritten = []
    for i, request in enumerate(requests):
        if not isinstance(request, dict) or set(request) != {"custom_id", "params"}:
            raise Refused(400, "invalid_request", "expected custom_id and params", where=f"requests[{i}]")
        outcome = await engine.rewrite("messages", request["params"], terms, caller)
        rewritten.append(request if outcome.body is None else request | {"params": outcome.body})
    return await asyncio.to_thread(dump, {"requests": rewritten})


def _parse(raw: bytes) -> Any:
    check_simple(raw)  # no string is cut out here: a line or a body is parsed with its images
    return parse(raw)
