"""``--upstream pocket``, ``smolvlm-pocket`` or ``hf:ID``: an embedded multimodal LLM as an upstream of its own.

The only module of the gateway that imports victims, and only when that option is given.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar, runtime_checkable

import httpx2
import torch
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from codefend.core import images
from codefend.gateway import dialects
from codefend.gateway.config import model_name
from codefend.gateway.dialects import Answer
from codefend.gateway.errors import Api, Refused, error_body
from codefend.gateway.limits import payload
from codefend.gateway.options import Limits
from codefend.gateway.routes import error_api_of
from codefend.gateway.shapes import Inspection, survey
from codefend.gateway.telemetry import log
from codefend.gateway.wire import check_simple, parse
from codefend.prompts.policy import attach
from codefend.types import CodefendError, Victim

Done = TypeVar("Done")


class Showcase(Protocol):
    """Samples and attacks for the page. The command line provides them: the gateway itself imports no attacks."""

    def sample(self, number: int, *, photographs: bool) -> dict[str, Any]: ...
    def attack(
        self, victim: Victim, image: torch.Tensor, question: str, check: Callable[[], None]
    ) -> dict[str, Any]: ...


def pocket_transport(
    victim: Victim | None = None, *, name: str = "pocket", policy: object = None, showcase: Showcase | None = None
) -> httpx2.AsyncBaseTransport:
    """The embedded model, a pocket by name or ``hf:ID_OR_FOLDER``, behind a transport.

    A soft prefix among policies becomes part of it; texts are handled elsewhere. Raises CodefendError when its packages
    or weights are missing, or the prefix was learned for another model.
    """
    if victim is None:
        from codefend import victims

        victim = victims.load(name)
    return httpx2.ASGITransport(
        app=create_pocket(attach(victim, policy), showcase, model=model_name(name)), raise_app_exceptions=False
    )


@dataclass(frozen=True)
class _Question:
    prompt: str
    image: torch.Tensor  # [3, H, W]


@runtime_checkable
class _HasTokens(Protocol):
    """A victim with a tokenizer."""

    def encode(self, texts: Sequence[str]) -> Sequence[Sequence[int]]: ...


class _Abandoned(Exception):
    """Nobody waits for the attack any more."""


class _PocketServer:
    """One question at a time, off the event loop; attacks in a thread of their own."""

    def __init__(self, victim: Victim, showcase: Showcase | None, model: str) -> None:
        self.victim, self.showcase, self.model = victim, showcase, model
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pocket")
        self._attacks = ThreadPoolExecutor(1, thread_name_prefix="attack")
        self._attacking = False

    async def answer(self, request: Request) -> Response:
        async def work(api: Api, body: Any) -> Response:
            usage = _wants_usage(body)
            answer = await self._aside(self._generate, api, body)
            if body.get("stream"):
                return Response(dialects.events(api, answer, usage=usage), media_type="text/event-stream")
            return JSONResponse(dialects.whole(api, answer))

        return await _respond(request, work)

    async def count(self, request: Request) -> Response:
        async def work(api: Api, body: Any) -> Response:
            kind = {} if api == "messages" else {"object": "response.input_tokens"}
            return JSONResponse(kind | {"input_tokens": self._count(_question(api, body).prompt)})

        return await _respond(request, work)

    async def sample(self, request: Request) -> Response:
        async def work(api: Api, body: Any) -> Response:
            number = body.get("number")
            if not isinstance(number, int):
                raise Refused(400, "invalid_request", 'expected {"number": 0}')
            draw = partial(self._showcase.sample, number, photographs=self.model == "pocket")  # it knows photographs
            return JSONResponse(await self._aside(draw))

        return await _respond(request, work)

    async def attack(self, request: Request) -> Response:
        async def work(api: Api, body: Any) -> Response:
            image, question = body.get("image"), body.get("question")
            if not isinstance(image, str) or not isinstance(question, str) or not question.strip():
                raise Refused(400, "invalid_request", 'expected {"image": data URL, "question": text}')
            if self._attacking:
                raise Refused(503, "busy", "another image is being attacked; try again in some seconds", retry_after=5)
            self._attacking, abandoned = True, threading.Event()
            loop = asyncio.get_running_loop()
            try:
                return JSONResponse(await loop.run_in_executor(self._attacks, self._attack, image, question, abandoned))
            finally:
                abandoned.set()
                self._attacking = False

        return await _respond(request, work)

    @property
    def _showcase(self) -> Showcase:
        if self.showcase is None:
            raise Refused(404, "not_found", "there are no samples and attacks here")
        return self.showcase

    def _attack(self, image: str, question: str, abandoned: threading.Event) -> dict[str, Any]:
        def check() -> None:
            if abandoned.is_set():
                raise _Abandoned

        pixels = images.load(payload(image, Limits())).pixels
        return self._showcase.attack(self.victim, pixels, question, check)

    async def _aside(self, work: Callable[..., Done], *arguments: Any) -> Done:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)

    def _generate(self, api: Api, body: Any) -> Answer:
        question = _question(api, body)
        with torch.no_grad():
            text = self.victim.generate(question.image[None], [question.prompt])[0]
        return Answer(self.model, text, prompt_tokens=self._count(question.prompt), tokens=self._count(text))

    def _count(self, text: str) -> int:
        return len(text.split()) if not isinstance(self.victim, _HasTokens) else len(self.victim.encode([text])[0])


def _wants_usage(body: dict[str, Any]) -> bool:
    options = body.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise Refused(400, "invalid_request", "stream_options must be an object", where="stream_options")
    return bool((options or {}).get("include_usage"))


def _parse(raw: bytes) -> dict[str, Any]:
    check_simple(raw)
    body = parse(raw)
    if not isinstance(body, dict):
        raise Refused(400, "invalid_request", "the body must be a JSON object")
    return body


async def _respond(request: Request, work: Callable[[Api, Any], Awaitable[Response]]) -> Response:
    """What ``work`` makes of the body, which is an object; or its refusal in the API's own form."""
    api = error_api_of(request.url.path)
    try:
        return await work(api, await asyncio.to_thread(_parse, await request.body()))
    except Refused as error:
        refusal = error
    except CodefendError as error:
        refusal = Refused(400, "invalid_request", str(error))
    except Exception as error:
        log.exception("the embedded model failed")
        refusal = Refused(500, "internal_error", f"internal error ({type(error).__name__})")
    return Response(refusal.body(api), status_code=refusal.status, media_type="application/json")


def create_pocket(victim: Victim, showcase: Showcase | None = None, *, model: str = "pocket") -> Starlette:
    """Chat completions, responses and Anthropic messages for a victim that accepts one image and one prompt.

    ``/v1/demo/*`` is the page's: no request of a client reaches it.
    """
    server = _PocketServer(victim, showcase, model)
    card = {"id": model, "object": "model", "created": 0, "owned_by": "codefend"}

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [card]})

    async def described(request: Request) -> Response:
        return JSONResponse(card)

    async def missing(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        message = f"the model {model} has no {request.method} {request.url.path[:100]}"
        raw = error_body(error_api_of(request.url.path), status, "not_found", message)
        return Response(raw, status_code=status, media_type="application/json")

    posts = {
        "chat/completions": server.answer,
        "responses": server.answer,
        "messages": server.answer,
        "messages/count_tokens": server.count,
        "responses/input_tokens": server.count,
        "demo/sample": server.sample,
        "demo/attack": server.attack,
    }
    return Starlette(
        routes=[
            Route("/v1/models", models),
            Route(f"/v1/models/{model}", described),
            *(Route(f"/v1/{path}", endpoint, methods=["POST"]) for path, endpoint in posts.items()),
        ],
        exception_handlers={HTTPException: missing},
    )


def _question(api: Api, body: Any) -> _Question:
    """The last user's words and the one image of the conversation. Raises Refused for none and for several."""
    slots = survey(api, body, Inspection(image_links=True)).slots  # to this model links are words
    if len(slots) != 1:
        code = "too_many_images" if slots else "image_missing"
        sent = f"this conversation holds {len(slots)}; start a new one with one" if slots else "send one"
        raise Refused(400, code, f"the embedded model answers questions about one image; {sent}")
    loaded = images.load(payload(slots[0].reference, Limits()))
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
