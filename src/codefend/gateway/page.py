"""What the page at ``/`` needs besides the API itself."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import httpx2
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from codefend.gateway.budget import ClientGone, Lease, read_body
from codefend.gateway.engine import Caller, Outcome
from codefend.gateway.errors import Refused
from codefend.gateway.headers import to_upstream, visible_score
from codefend.gateway.proxy import Proxy
from codefend.gateway.telemetry import log
from codefend.gateway.wire import dump

_CHAT = "/v1/chat/completions"


class Page:
    """A few small routes. ``demo`` allows those that send an image without purifying it; ``model`` is embedded."""

    def __init__(self, proxy: Proxy, *, demo: bool, showcase: bool, model: str | None = None) -> None:
        self.engine, self.proxy, self.demo, self.showcase = proxy.engine, proxy, demo, demo and showcase
        self.model = model

    async def info(self, request: Request) -> Response:
        terms, limit = self.engine.terms, self.engine.limits.max_image_bytes
        facts = {"purifier": self.engine.worker.name, "policy": terms.mode, "threshold": terms.threshold}
        facts["model"] = self.model
        return JSONResponse(facts | {"demo": self.demo, "attack": self.showcase, "max_image_bytes": limit})

    async def sample(self, request: Request) -> Response:
        """``{"number": n}`` -> an image that the embedded model knows, a question and the correct answer."""
        return await self._answer(request, self._demo("/v1/demo/sample"), route=_CHAT)

    async def attack(self, request: Request) -> Response:
        """``{"image": data URL, "question": text}`` -> the image attacked so that the model's answer changes."""
        return await self._answer(request, self._demo("/v1/demo/attack"), route=_CHAT)

    async def purify(self, request: Request) -> Response:
        """``{"image": data URL}`` -> the purified one, its score, milliseconds, and whether it came from the cache."""

        async def work(raw: bytes, lease: Lease) -> Response:
            caller = Caller(lease.client, lease.take)
            body, outcome = await self.engine.rewrite_bytes("image", raw, caller=caller)
            scores = "exact" if self.demo else self.proxy.settings.scores
            return Response(
                body[:-1]
                + b","
                + dump(_facts(outcome) | {"score": visible_score(outcome.images[0].score, scores)})[1:],
                media_type="application/json",
            )

        return await self._answer(request, work)

    async def undefended(self, request: Request) -> Response:
        """A chat request whose images are re-encoded, not purified. Only where the operator allows the comparison."""

        async def work(raw: bytes, lease: Lease) -> Response:
            if not self.demo:
                raise Refused(403, "demo_off", "the undefended model is not available here (start with --demo)")
            body = await self.engine.reencode_all(await self.engine.read("chat", raw))
            self.proxy.meters.bypass.labels("demo").inc()
            log.warning("page asked the undefended model", extra={"fields": {"reason": "demo"}})
            return await self._ask(_CHAT, dump(body))

        return await self._answer(request, work, route=_CHAT)

    def _demo(self, path: str) -> Callable[[bytes, Lease], Coroutine[Any, Any, Response]]:
        async def work(raw: bytes, lease: Lease) -> Response:
            if not self.showcase:
                raise Refused(403, "demo_off", "only with a pocket model as the upstream can the page attack images")
            return await self._ask(path, raw)

        return work

    async def _answer(
        self, request: Request, work: Callable[[bytes, Lease], Coroutine[Any, Any, Response]], *, route: str = ""
    ) -> Response:
        """Read the body and work on it until the client leaves. The request's key must be one for ``route``."""
        limit, client = self.engine.limits.max_body_bytes, str(request.scope.get("codefend.client", ""))
        with self.proxy.budget.lease(client) as lease:
            try:
                if route:
                    self.proxy.check_route(request.scope, "POST", route)
                raw = await read_body(request.receive, limit, lease.take)
                with self.proxy.share(client):
                    return await self.proxy.until_gone(work(raw, lease), request.receive)
            except Refused as refusal:
                self.proxy.meters.refused.labels(refusal.code).inc()
                seconds = refusal.retry_seconds
                headers = {} if seconds is None else {"retry-after": str(seconds)}
                return Response(refusal.body("other"), refusal.status, headers, "application/json")
            except ClientGone:
                return Response(status_code=499)

    async def _ask(self, path: str, body: bytes) -> Response:
        """Send JSON of the page's own to the upstream. Raises Refused."""
        upstream = self.proxy.upstream
        headers = to_upstream([(b"content-type", b"application/json")], upstream_key=upstream.key)
        response: httpx2.Response = await upstream.send(upstream.request("POST", path, b"", headers, body))
        try:
            await response.aread()
        except (httpx2.HTTPError, OSError) as error:
            self.proxy.meters.upstream_errors.labels("broken").inc()
            raise Refused(502, "upstream_broken", "the upstream broke off") from error
        finally:
            await asyncio.shield(response.aclose())
        return Response(response.content, response.status_code, media_type="application/json")


def _facts(outcome: Outcome) -> dict[str, Any]:
    image = outcome.images[0]
    return {"ms": round(outcome.seconds * 1000, 1), "cached": image.cached, "purified": image.purified}
