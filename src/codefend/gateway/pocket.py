"""``--upstream pocket``: the embedded multimodal LLM as an upstream of its own, in this process.

The only place of the gateway that reaches for a victim, and only when that option is given.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import httpx2
import torch
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from codefend import images
from codefend.gateway import dialects
from codefend.gateway.dialects import Answer
from codefend.gateway.errors import Api, Refused, error_body
from codefend.gateway.limits import Limits, payload
from codefend.gateway.shapes import survey
from codefend.gateway.wire import form_of, parse
from codefend.types import UserError, Victim

MODEL = "pocket"


def pocket_transport(victim: Victim | None = None, *, name: str = MODEL) -> httpx2.AsyncBaseTransport:
    """The embedded model, the pocket or ``hf:ID_OR_FOLDER``, behind a transport.

    Raises UserError when its packages or weights are missing.
    """
    loaded: Victim = import_module("codefend.victims").load(name) if victim is None else victim
    return httpx2.ASGITransport(app=create_pocket(loaded), raise_app_exceptions=False)


@dataclass(frozen=True)
class _Question:
    prompt: str
    image: torch.Tensor  # [3, H, W]


class _Server:
    """One question at a time, off the event loop."""

    def __init__(self, victim: Victim) -> None:
        self.victim = victim
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pocket")

    async def answer(self, request: Request) -> Response:
        api = form_of(request.url.path)
        try:
            body = parse(await request.body())
            loop = asyncio.get_running_loop()
            answer = await loop.run_in_executor(self._thread, self._generate, api, body)
        except (Refused, UserError) as error:
            status, code = (error.status, error.code) if isinstance(error, Refused) else (400, "invalid_request")
            raw = error_body(api, status, code, str(error))
            return Response(raw, status_code=status, media_type="application/json")
        if body.get("stream"):
            usage = bool((body.get("stream_options") or {}).get("include_usage"))
            return Response(dialects.events(api, answer, usage=usage), media_type="text/event-stream")
        return JSONResponse(dialects.whole(api, answer))

    def _generate(self, api: Api, body: Any) -> Answer:
        question = _question(api, body)
        with torch.no_grad():
            text = self.victim.generate(question.image[None], [question.prompt])[0]
        return Answer(MODEL, text, prompt_tokens=self._count(question.prompt), tokens=self._count(text))

    def _count(self, text: str) -> int:
        encode = getattr(self.victim, "encode", None)
        return len(encode([text])[0]) if callable(encode) else len(text.split())


def create_pocket(victim: Victim) -> Starlette:
    """Chat completions, responses and Anthropic messages for a victim that sees one image and one prompt."""
    server = _Server(victim)

    async def models(request: Request) -> Response:
        card = {"id": MODEL, "object": "model", "created": 0, "owned_by": "codefend"}
        return JSONResponse({"object": "list", "data": [card]})

    paths = ("/v1/chat/completions", "/v1/responses", "/v1/messages")
    return Starlette(routes=[Route("/v1/models", models), *(Route(p, server.answer, methods=["POST"]) for p in paths)])


def _question(api: Api, body: Any) -> _Question:
    """The last user's words and the last image of the conversation."""
    found = survey(api, body)
    if not found.slots:
        raise Refused(400, "image_missing", "the pocket model answers questions about one image; send one")
    loaded = images.load(payload(found.slots[-1].reference, Limits()))
    words = _words(_last_user(api, body))
    if not words:
        raise Refused(400, "question_missing", "ask a question about the image")
    system = _system(api, body)
    return _Question(f"{system}\n\n{words}" if system else words, loaded.pixels)


def _last_user(api: Api, body: Any) -> Any:
    if api == "responses" and isinstance(body["input"], str):
        return body["input"]
    turns = body["input"] if api == "responses" else body["messages"]
    return next((turn.get("content") for turn in reversed(turns) if turn.get("role") == "user"), "")


def _system(api: Api, body: Any) -> str:
    if api == "responses":
        return _words(body.get("instructions"))
    if api == "messages":
        return _words(body.get("system"))
    return "\n\n".join(_words(m.get("content")) for m in body["messages"] if m.get("role") in ("system", "developer"))


def _words(content: Any) -> str:
    if isinstance(content, str):
        return content.strip()
    parts: Sequence[Any] = content if isinstance(content, list) else ()
    return "\n".join(p["text"] for p in parts if isinstance(p, dict) and isinstance(p.get("text"), str)).strip()
