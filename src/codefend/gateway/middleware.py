"""``PurifyMiddleware``: for a server of one's own that already speaks ASGI (FastAPI, Starlette, vLLM's front end)."""

from __future__ import annotations

import secrets

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from codefend.gateway.access import send_refusal
from codefend.gateway.budget import ClientGone, read_body
from codefend.gateway.errors import Refused
from codefend.gateway.headers import find, report
from codefend.gateway.local import local_engine
from codefend.gateway.options import LaneOptions, Limits, Mode, OnError
from codefend.gateway.routes import api_by_suffix
from codefend.purifiers.base import Purifier


class PurifyMiddleware:
    """Purify the images of chat completions, responses and Anthropic messages before ``app`` sees them.

    Other routes pass untouched: they are the application's own. With ``image_links`` http(s) images in Markdown and
    HTML pass as text; ``tools`` names tools by which the server may load content itself. Raises CodefendError for
    unknown names.
    """

    def __init__(
        self,
        app: ASGIApp,
        purifier: str | Purifier = "bridge",
        *,
        prompt: str = "none",
        policy: Mode = "purify",
        threshold: float | None = None,
        on_error: OnError = "block",
        image_links: bool = False,
        tools: tuple[str, ...] = (),
        limits: Limits | None = None,
        device: str = "cpu",
    ) -> None:
        self.app = app
        self.engine = local_engine(
            purifier,
            prompt=prompt,
            policy=policy,
            threshold=threshold,
            on_error=on_error,
            image_links=image_links,
            tools=tools,
            limits=limits,
            device=device,
            lane=LaneOptions(),
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, self._until_shutdown(receive), send)
        elif scope["type"] == "http" and scope["method"] == "POST" and api_by_suffix(scope["path"]) != "other":
            await self._purify(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _until_shutdown(self, receive: Receive) -> Receive:
        async def watched() -> Message:
            message = await receive()
            if message["type"] == "lifespan.shutdown" and self.engine.lane is not None:
                await self.engine.lane.close()
            return message

        return watched

    async def _purify(self, scope: Scope, receive: Receive, send: Send) -> None:
        api, request_id = api_by_suffix(scope["path"]), secrets.token_hex(8)
        try:
            if find(scope["headers"], b"content-encoding") not in (None, "", "identity"):
                raise Refused(415, "unknown_content", "send the body without content-encoding")
            raw = await read_body(receive, self.engine.limits.max_body_bytes)
            body, outcome = await self.engine.rewrite_bytes(api, raw)
        except Refused as refusal:
            await send_refusal(refusal, refusal.body(api, request_id), send)
            return
        except ClientGone:
            return
        length = (b"content-length", str(len(body)).encode())
        kind = (b"content-type", b"application/json")  # what was checked is what the application shall read
        drop = (b"content-length", b"content-type", b"transfer-encoding")
        headers = [pair for pair in scope["headers"] if pair[0] not in drop]
        extra = report(outcome, purifier=self.engine.worker.name, request_id=request_id)
        await self.app({**scope, "headers": [*headers, kind, length]}, _replay(body, receive), _adding(extra, send))


def _replay(body: bytes, receive: Receive) -> Receive:
    given = False

    async def replayed() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed


def _adding(extra: list[tuple[bytes, bytes]], send: Send) -> Send:
    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), *extra]}
        await send(message)

    return sent
