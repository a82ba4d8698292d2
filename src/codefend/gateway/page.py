"""What the page at ``/`` asks for beside the API itself."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from codefend.gateway.engine import Engine, Outcome
from codefend.gateway.errors import Refused, error_body
from codefend.gateway.limits import inspect, payload
from codefend.gateway.proxy import Proxy
from codefend.gateway.rewrite import rebuild, survey
from codefend.gateway.telemetry import log
from codefend.gateway.wire import dump, parse
from codefend.gateway.worker import Job

_CHAT = "/v1/chat/completions"


class Page:
    """A few small routes. ``demo`` allows those that send an image without purifying it."""

    def __init__(self, engine: Engine, proxy: Proxy, *, demo: bool) -> None:
        self.engine, self.proxy, self.demo = engine, proxy, demo

    async def info(self, request: Request) -> Response:
        terms = self.engine.terms
        facts = {"purifier": self.engine.worker.name, "policy": terms.mode, "threshold": terms.threshold}
        limit = self.engine.limits.max_image_bytes
        return JSONResponse(facts | {"demo": self.demo, "attack": self._pocket, "max_image_bytes": limit})

    @property
    def _pocket(self) -> bool:
        """Whether there is an embedded model to play with."""
        return self.demo and self.proxy.settings.upstream == "pocket"

    async def sample(self, request: Request) -> Response:
        """``{"number": n}`` -> a picture that the embedded model knows, what to ask, and the right answer."""
        return await self._shown(request, "/v1/demo/sample")

    async def attack(self, request: Request) -> Response:
        """``{"image": data URL, "question": text}`` -> the picture attacked so that the model's answer changes."""
        return await self._shown(request, "/v1/demo/attack")

    async def _shown(self, request: Request, path: str) -> Response:
        try:
            if not self._pocket:
                raise Refused(403, "demo_off", "only with --upstream pocket can the page attack pictures")
            response = await self.proxy.ask(path, await self._body(request))
        except Refused as refusal:
            return _refusal(refusal)
        return Response(response.content, status_code=response.status_code, media_type="application/json")

    async def purify(self, request: Request) -> Response:
        """``{"image": data URL}`` -> the purified one, its score, milliseconds, and whether it came from the cache."""
        try:
            body = {"messages": [{"role": "user", "content": [_part(await self._image(request))]}]}
            outcome = await self.engine.rewrite("chat", body)
        except Refused as refusal:
            return _refusal(refusal)
        return JSONResponse(_facts(outcome))

    async def undefended(self, request: Request) -> Response:
        """A chat request whose images are re-encoded, not purified. Only where the operator allows the comparison."""
        try:
            if not self.demo:
                raise Refused(403, "demo_off", "the undefended model is not shown here (start with --demo)")
            raw = await self._body(request)
            body = await asyncio.to_thread(self._unpurified, parse(raw))
            self.proxy.meters.bypass.labels("demo").inc()
            log.warning("page asked the undefended model", extra={"fields": {"reason": "demo"}})
            response = await self.proxy.ask(_CHAT, dump(body))
        except Refused as refusal:
            return _refusal(refusal)
        return Response(response.content, status_code=response.status_code, media_type="application/json")

    def _unpurified(self, body: Any) -> Any:
        found, limits = survey("chat", body, image_links=self.engine.image_links), self.engine.limits
        pictures = []
        for slot in found.slots:
            data = payload(slot.reference, limits)
            inspect(data, limits)
            pictures.append(self.engine.reencoded(Job(data)).picture)
        return rebuild(body, found, pictures)

    async def _image(self, request: Request) -> str:
        body = parse(await self._body(request))
        if not isinstance(body, dict) or not isinstance(body.get("image"), str) or len(body) != 1:
            raise Refused(400, "invalid_request", 'expected {"image": "data:image/...;base64,..."}')
        return str(body["image"])

    async def _body(self, request: Request) -> bytes:
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > self.engine.limits.max_body_bytes:
                raise Refused(413, "body_too_large", "the body is too large")
            parts.append(part)
        return b"".join(parts)


def _part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def _facts(outcome: Outcome) -> dict[str, Any]:
    image = outcome.images[0]
    return {
        "image": f"data:{image.picture.media_type};base64,{image.picture.data}",
        "score": image.score,
        "ms": round(outcome.seconds * 1000, 1),
        "cached": image.cached,
        "purified": image.purified,
    }


def _refusal(refusal: Refused) -> Response:
    body = error_body("other", refusal.status, refusal.code, refusal.message, where=refusal.where)
    headers = {} if refusal.retry_after is None else {"retry-after": str(max(1, round(refusal.retry_after)))}
    return Response(body, status_code=refusal.status, media_type="application/json", headers=headers)
