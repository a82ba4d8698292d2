"""``--upstream pocket``: the embedded multimodal LLM as an upstream of its own, in this process.

The only place of the gateway that reaches for a victim, and only when that option is given.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from typing import Any, TypeVar

import httpx2
import torch
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from codefend.core import images
from codefend.gateway import dialects, showcase
from codefend.gateway.dialects import Answer
from codefend.gateway.errors import Api, Refused, error_body
from codefend.gateway.limits import Limits, payload
from codefend.gateway.shapes import survey
from codefend.gateway.wire import form_of, parse
from codefend.prompts.asking import prompted
from codefend.types import CodefendError, HasTokenizer, Victim

Done = TypeVar("Done")
MODEL = "pocket"


def pocket_transport(
    victim: Victim | None = None, *, name: str = MODEL, policy: object = None
) -> httpx2.AsyncBaseTransport:
    """The embedded model, the pocket or ``hf:ID_OR_FOLDER``, behind a transport.

    A soft prefix among policies is put into it; words are not its business. Raises CodefendError when its packages or
    weights are missing, or the prefix was learned for another model.
    """
    loaded: Victim = import_module("codefend.victims").load(name) if victim is None else victim
    return httpx2.ASGITransport(app=create_pocket(prompted(loaded, policy)), raise_app_exceptions=False)


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
        async def work(api: Api, body: Any) -> Response:
            answer = await self._aside(self._generate, api, body)
            if body.get("stream"):
                usage = bool((body.get("stream_options") or {}).get("include_usage"))
                return Response(dialects.events(api, answer, usage=usage), media_type="text/event-stream")
            return JSONResponse(dialects.whole(api, answer))

        return await _answered(request, work)

    async def count(self, request: Request) -> Response:
        async def work(api: Api, body: Any) -> Response:
            kind = {} if api == "messages" else {"object": "response.input_tokens"}
            return JSONResponse(kind | {"input_tokens": self._count(_question(api, body).prompt)})

        return await _answered(request, work)

    async def sample(self, request: Request) -> Response:
        async def work(api: Api, body: Any) -> Response:
            number = body.get("number")
            if not isinstance(number, int):
                raise Refused(400, "invalid_request", 'expected {"number": 0}')
            return JSONResponse(await self._aside(showcase.sample, number))

        return await _answered(request, work)

    async def attack(self, request: Request) -> Response:
        async def work(api: Api, body: Any) -> Response:
            question = body.get("question")
            if not isinstance(body.get("image"), str) or not isinstance(question, str) or not question.strip():
                raise Refused(400, "invalid_request", 'expected {"image": data URL, "question": text}')
            return JSONResponse(await self._aside(self._attacked, body["image"], question))

        return await _answered(request, work)

    def _attacked(self, image: str, question: str) -> dict[str, Any]:
        pixels = images.load(payload(image, Limits())).pixels
        return showcase.attacked(self.victim, pixels, question)

    async def _aside(self, work: Callable[..., Done], *arguments: Any) -> Done:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)

    def _generate(self, api: Api, body: Any) -> Answer:
        question = _question(api, body)
        with torch.no_grad():
            text = self.victim.generate(question.image[None], [question.prompt])[0]
        return Answer(MODEL, text, prompt_tokens=self._count(question.prompt), tokens=self._count(text))

    def _count(self, text: str) -> int:
        return len(self.victim.encode([text])[0]) if isinstance(self.victim, HasTokenizer) else len(text.split())


async def _answered(request: Request, work: Callable[[Api, Any], Awaitable[Response]]) -> Response:
    """What ``work`` makes of the body, which is an object; or its refusal in the API's own form."""
    api = form_of(request.url.path)
    try:
        body = parse(await request.body())
        if not isinstance(body, dict):
            raise Refused(400, "invalid_request", "the body must be a JSON object")
        return await work(api, body)
    except (Refused, CodefendError) as error:
        status, code = (error.status, error.code) if isinstance(error, Refused) else (400, "invalid_request")
        raw = error_body(api, status, code, str(error))
        return Response(raw, status_code=status, media_type="application/json")


def create_pocket(victim: Victim) -> Starlette:
    """Chat completions, responses and Anthropic messages for a victim that sees one image and one prompt.

    ``/v1/demo/*`` is the page's: through the gateway's own door no image reaches it.
    """
    server = _Server(victim)
    card = {"id": MODEL, "object": "model", "created": 0, "owned_by": "codefend"}

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [card]})

    async def model(request: Request) -> Response:
        return JSONResponse(card)

    async def missing(request: Request, error: Exception) -> Response:
        status = getattr(error, "status_code", 500)
        message = f"the pocket model has no {request.method} {request.url.path[:100]}"
        raw = error_body(form_of(request.url.path), status, "not_found", message)
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
            Route(f"/v1/models/{MODEL}", model),
            *(Route(f"/v1/{path}", endpoint, methods=["POST"]) for path, endpoint in posts.items()),
        ],
        exception_handlers={HTTPException: missing},
    )


def _question(api: Api, body: Any) -> _Question:
    """The last user's words and the last image of the conversation."""
    found = survey(api, body, image_links=True)  # to this model they are words
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
