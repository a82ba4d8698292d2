"""Uploaded files: images are purified, and so are those in the requests of a batch. Other files pass as they are.

An upload in parts is not inspected, so it is refused for images and batches.
"""

from __future__ import annotations

import asyncio
import base64
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from codefend.gateway.engine import Caller, Engine, Outcome, Terms
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
) -> tuple[bytes, Outcome]:
    """Purify the images of an upload to ``/v1/files``. The outcome has all images, without data. Raises Refused."""
    form = read_form(content_type, raw)
    for part in form.parts:
        if part.is_file != (part.name.lower() == "file") or (part.is_file and part.name != "file"):
            raise Refused(400, "unknown_content", "the form's only file is the field file", where=part.name)
    named = [part for part in form.parts if part.name.lower().startswith("purpose")]  # Purpose and purpose[] as well
    purpose = _purpose([part.content.decode("utf-8", "replace") for part in named])
    is_batch = purpose.startswith("batch")
    contents: list[bytes] = []
    outcomes: list[Outcome] = []
    for part in form.parts:
        content, outcome = part.content, Outcome()
        if part.is_file and is_batch:
            content, outcome = await _rewrite_batch(engine, check_route, part, terms, caller)
        elif part.is_file:
            content, outcome = await _rewrite_file(engine, part, terms, caller)
        contents.append(content)
        outcomes.append(outcome)
    return replace_contents(form, contents).write(), _join(outcomes)


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


async def _rewrite_file(engine: Engine, part: Part, terms: Terms, caller: Caller) -> tuple[bytes, Outcome]:
    try:
        read_header(part.content)
    except InvalidHeader as error:
        if is_other_image(part.content):
            raise Refused(
                400, "invalid_image", "an image of a kind that cannot be purified; send PNG or JPEG"
            ) from error
        if "is not an image" in str(error):
            return part.content, Outcome()
    outcome = await engine.rewrite_file(part.content, terms, caller)
    data = outcome.images[0].image.data
    caller.take(len(data))
    return base64.b64decode(data), _without_data(outcome)


async def _rewrite_batch(
    engine: Engine, check_route: CheckRoute, part: Part, terms: Terms, caller: Caller
) -> tuple[bytes, Outcome]:
    """One request a line: ``{"custom_id": ..., "method": ..., "url": ..., "body": {...}}``."""
    lines = [line for line in part.content.split(b"\n") if line.strip()]
    if len(lines) > _MAX_LINES:
        raise Refused(413, "body_too_complex", f"a batch of {len(lines):,} lines; the limit is {_MAX_LINES:,}")
    rewritten, outcomes = [], []
    for number, line in enumerate(lines, start=1):
        try:
            content, outcome = await _rewrite_line(engine, check_route, line, terms, caller)
        except Refused as refusal:
            where = f"line {number}" + (f": {refusal.where}" if refusal.where else "")
            raise refusal.at(where) from refusal
        rewritten.append(content)
        outcomes.append(_without_data(outcome))
    return b"\n".join(rewritten) + b"\n", _join(outcomes)


async def _rewrite_line(
    engine: Engine, check_route: CheckRoute, line: bytes, terms: Terms, caller: Caller
) -> tuple[bytes, Outcome]:
    request = await asyncio.to_thread(_parse, line)
    if not isinstance(request, dict) or set(request) != {"custom_id", "method", "url", "body"}:
        raise Refused(400, "invalid_request", "expected custom_id, method, url and body")
    method, url = request["method"], request["url"]
    if not isinstance(method, str) or not isinstance(url, str) or not isinstance(request["custom_id"], str):
        raise Refused(400, "invalid_request", "custom_id, method and url must be texts")
    check_path(url)
    check_route(method, url)
    outcome = await engine.rewrite(api_of(url), request["body"], terms, caller)
    body = request if outcome.body is None else request | {"body": outcome.body}
    return await asyncio.to_thread(dump, body), outcome


async def rewrite_message_batch(engine: Engine, raw: bytes, terms: Terms, caller: Caller) -> tuple[bytes, Outcome]:
    """Purify the images of Anthropic's ``{"requests": [{"custom_id": ..., "params": {...}}]}``.

    The outcome has all images, without data. Raises Refused.
    """
    body = await asyncio.to_thread(_parse, raw)
    requests = body.get("requests") if isinstance(body, dict) and set(body) == {"requests"} else None
    if not isinstance(requests, list):
        raise Refused(400, "invalid_request", 'expected {"requests": [...]}')
    rewritten, outcomes = [], []
    for i, request in enumerate(requests):
        if not isinstance(request, dict) or set(request) != {"custom_id", "params"}:
            raise Refused(400, "invalid_request", "expected custom_id and params", where=f"requests[{i}]")
        outcome = await engine.rewrite("messages", request["params"], terms, caller)
        rewritten.append(request if outcome.body is None else request | {"params": outcome.body})
        outcomes.append(_without_data(outcome))
    return await asyncio.to_thread(dump, {"requests": rewritten}), _join(outcomes)


def _without_data(outcome: Outcome) -> Outcome:
    """The outcome without bytes of images: those of a whole batch stand in its body."""
    images = tuple(replace(image, image=replace(image.image, data="")) for image in outcome.images)
    return replace(outcome, body=None, images=images)


def _join(outcomes: Sequence[Outcome]) -> Outcome:
    """One outcome for several, in their order."""
    images = tuple(image for outcome in outcomes for image in outcome.images)
    bypassed = tuple(reason for outcome in outcomes for reason in outcome.bypassed)
    return Outcome(None, images, bypassed, sum(outcome.seconds for outcome in outcomes))


def _parse(raw: bytes) -> Any:
    check_simple(raw)  # no string is cut out here: a line or a body is parsed with its images
    return parse(raw)
