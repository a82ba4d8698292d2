"""``/v1/*``: read, rewrite, send on, stream back. Pure ASGI, so that a request without images costs little."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections import Counter
from collections.abc import Coroutine, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import httpx2
from starlette.types import Receive, Scope, Send

from codefend.gateway.access import client_fields, send_refusal
from codefend.gateway.budget import BodyBudget, ClientGone, Lease, read_body
from codefend.gateway.config import Settings
from codefend.gateway.engine import Caller, Engine, Outcome, Terms
from codefend.gateway.errors import Api, Refused, error_body
from codefend.gateway.forms import check_audio_form
from codefend.gateway.headers import Headers, find, report, to_client, to_upstream, with_text
from codefend.gateway.routes import api_of, check_path, error_api_of, is_part, route_label
from codefend.gateway.telemetry import Meters, Tracer, log
from codefend.gateway.uploads import (
    FILES,
    MESSAGE_BATCHES,
    UPLOADS,
    check_upload,
    rewrite_message_batch,
    rewrite_upload,
)
from codefend.gateway.upstream import Upstream
from codefend.gateway.votes import check_votable, choose

Done = TypeVar("Done")


class Broken(Exception):
    """The upstream broke off after the answer had begun."""


_OF_THE_BODY = (b"content-length", b"content-encoding")
_REQUEST_ID = re.compile(r"[\w.-]{1,64}\Z", re.ASCII)


@dataclass
class Exchange:
    """One request on its way."""

    scope: Scope
    send: Send
    api: Api
    request_id: str
    lease: Lease
    started: float = field(default_factory=time.perf_counter)
    status: int = 0  # 0 until the answer has begun
    outcome: Outcome | None = None
    code: str = ""  # of the refusal
    upstream_ms: float | None = None  # until the upstream's headers

    @property
    def path(self) -> str:
        return str(self.scope["path"])

    @property
    def route(self) -> str:
        return route_label(self.path)

    @property
    def client(self) -> str:
        return str(self.scope.get("codefend.client", ""))

    @property
    def trace(self) -> dict[str, str]:
        """The caller's ``traceparent`` and ``tracestate``."""
        pairs = self.scope["headers"]
        return {key.decode("latin-1"): value.decode("latin-1") for key, value in pairs if key.startswith(b"trace")}


class Proxy:
    """The ASGI application behind ``/v1``."""

    def __init__(
        self, engine: Engine, settings: Settings, meters: Meters, upstream: Upstream, budget: BodyBudget
    ) -> None:
        self.engine, self.meters, self.upstream, self.budget = engine, meters, upstream, budget
        self.tracer = Tracer()
        self._in_flight: Counter[str] = Counter()
        self.configure(settings)

    def configure(self, settings: Settings) -> None:
        """Use other settings for the requests to come."""
        self.settings, self.routes = settings, settings.allowed_routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = next((value for key, value in scope["headers"] if key == b"x-request-id"), b"").decode("latin-1")
        request_id = given if _REQUEST_ID.match(given) else secrets.token_hex(8)
        with self.budget.lease(str(scope.get("codefend.client", ""))) as lease:
            exchange = Exchange(scope, send, error_api_of(scope["path"]), request_id, lease)
            self.meters.in_flight.inc()
            try:
                with self._span("codefend.request", exchange, parent=exchange.trace):
                    await self._guarded(exchange, receive)
                    self.tracer.note(status=exchange.status, code=exchange.code)
            finally:
                self.meters.in_flight.dec()
                self._record(exchange)

    async def _guarded(self, exchange: Exchange, receive: Receive) -> None:
        try:
            async with asyncio.timeout(self.settings.total_timeout_s):
                self._check_head(exchange.scope)
                raw = await self._body(exchange, receive)
                await self.until_gone(self._answer(exchange, raw), receive)
        except Refused as refusal:
            await self._refuse(exchange, refusal)
        except TimeoutError:
            await self._refuse(exchange, Refused(504, "timeout", "the exchange took too long"))
        except ClientGone:
            self.meters.disconnects.inc()
            exchange.code = "client_gone"
        except Broken:
            pass  # returning without the end of the answer makes the server close the connection
        except Exception as error:  # fail closed: whatever went wrong, nothing was passed on without inspection
            log.exception("internal error", extra={"fields": {"request_id": exchange.request_id}})
            await self._refuse(exchange, Refused(500, "internal_error", f"internal error ({type(error).__name__})"))

    def _check_head(self, scope: Scope) -> None:
        """Refuse by path, route and headers, before the body is read."""
        check_path(scope["path"])
        self.check_route(scope, scope["method"], scope["path"])
        if find(scope["headers"], b"content-encoding") not in (None, "", "identity"):
            raise Refused(415, "unknown_content", "send the body without content-encoding")

    def check_route(self, scope: Scope, method: str, path: str) -> None:
        """Raise Refused (403, 404) for a route that is not served, or not to the request's key."""
        self.routes.check(method, path, key=scope.get("codefend.routes"))

    async def _body(self, exchange: Exchange, receive: Receive) -> bytes:
        limit, headers = self.settings.max_body_bytes, exchange.scope["headers"]
        length = find(headers, b"content-length")
        if length is not None and length.isdigit() and int(length) > limit:
            raise Refused(413, "body_too_large", f"the body is over the limit of {limit:,} bytes")
        try:
            async with asyncio.timeout(self.settings.body_timeout_s):
                return await read_body(receive, limit, exchange.lease.take)
        except TimeoutError as error:
            raise Refused(408, "body_timeout", "the request body did not arrive in time") from error

    async def until_gone(self, work: Coroutine[Any, Any, Done], receive: Receive) -> Done:
        """Do the work unless the client leaves; then cancel it, and with it the request to the upstream."""
        working = asyncio.ensure_future(work)
        watching = asyncio.ensure_future(_disconnect(receive))
        try:
            await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise ClientGone
            return working.result()
        finally:
            for task in (working, watching):
                task.cancel()
            await asyncio.gather(working, watching, return_exceptions=True)

    async def _answer(self, exchange: Exchange, raw: bytes) -> None:
        body = await self._rewrite(exchange, raw)
        scope = exchange.scope
        headers = to_upstream(
            scope["headers"], drop=scope.get("codefend.key_headers", frozenset()), upstream_key=self.upstream.key
        )
        with self._span("codefend.upstream", exchange) as onward:
            own = {"x-request-id": exchange.request_id, **onward}
            headers = [pair for pair in headers if pair[0].decode("latin-1") not in own]
            headers += [(key.encode(), value.encode()) for key, value in own.items()]
            if self._votes(exchange) > 1:
                return await self._answer_by_vote(exchange, raw, body, headers)
            content = body if body or scope["method"] in ("POST", "PUT", "PATCH") else None
            request = self.upstream.request(scope["method"], scope["path"], scope["query_string"], headers, content)
            start = time.perf_counter()
            response = await self.upstream.send(request)
            exchange.upstream_ms = (time.perf_counter() - start) * 1000
            try:
                await self._stream(exchange, response)
            finally:
                await response.aclose()

    def _votes(self, exchange: Exchange) -> int:
        """The number of answers to vote on: several where images were purified for a model, not for a batch."""
        images = () if exchange.outcome is None or api_of(exchange.path) == "other" else exchange.outcome.images
        return self.settings.votes if any(image.purified for image in images) else 1

    async def _answer_by_vote(self, exchange: Exchange, raw: bytes, first: bytes, headers: Headers) -> None:
        """Ask the upstream with each draw of the noise, and send the answer that most others are like."""
        scope, api, start = exchange.scope, api_of(exchange.path), time.perf_counter()
        check_votable(exchange.outcome)
        plain = [pair for pair in headers if pair[0] != b"accept-encoding"] + [(b"accept-encoding", b"identity")]

        async def ask(turn: int) -> httpx2.Response:
            body = first
            if turn:
                terms, caller = replace(self._terms(scope), turn=turn), Caller(exchange.client, exchange.lease.take)
                body, _ = await self.engine.rewrite_bytes(api, raw, terms, caller)
            request = self.upstream.request(scope["method"], scope["path"], scope["query_string"], plain, body)
            response = await self.upstream.send(request)
            try:
                await response.aread()
            except (httpx2.HTTPError, OSError) as error:
                raise Refused(502, "upstream_broken", "the upstream broke off") from error
            finally:
                await response.aclose()
            return response

        turns = [asyncio.ensure_future(ask(turn)) for turn in range(self._votes(exchange))]
        try:
            response = choose(api, await asyncio.gather(*turns))
        finally:
            for turn in turns:
                turn.cancel()
            await asyncio.gather(*turns, return_exceptions=True)
        exchange.upstream_ms = (time.perf_counter() - start) * 1000
        lines = [pair for pair in self._response_headers(exchange, response) if pair[0] not in _OF_THE_BODY]
        exchange.status = response.status_code
        await exchange.send({"type": "http.response.start", "status": response.status_code, "headers": lines})
        await exchange.send({"type": "http.response.body", "body": response.content})

    def _span(
        self, name: str, exchange: Exchange, *, parent: dict[str, str] | None = None
    ) -> AbstractContextManager[dict[str, str]]:
        return self.tracer.span(name, parent, route=exchange.route, request_id=exchange.request_id)

    async def _rewrite(self, exchange: Exchange, raw: bytes) -> bytes:
        """The body to send: the original bytes when nothing in them had to change."""
        scope = exchange.scope
        begins_upload = exchange.path == UPLOADS and scope["method"] == "POST"
        if not raw and not begins_upload:
            return raw
        if find(scope["headers"], b"content-type") is None or _is_json(scope):
            if begins_upload:
                await check_upload(raw)
            terms, caller = self._terms(scope), Caller(exchange.client, exchange.lease.take)
            with self.share(exchange.client), self._span("codefend.purify", exchange):
                if exchange.path == MESSAGE_BATCHES:
                    body, exchange.outcome = await rewrite_message_batch(self.engine, raw, terms, caller)
                else:
                    body, exchange.outcome = await self.engine.rewrite_bytes(api_of(exchange.path), raw, terms, caller)
            return body
        if exchange.path == FILES:
            return await self._rewrite_upload(exchange, raw)
        if exchange.path in ("/v1/audio/transcriptions", "/v1/audio/translations"):
            check_audio_form(find(scope["headers"], b"content-type") or "", raw)
            return raw
        if self.settings.allow_uploads and is_part(scope["method"], exchange.path):
            return raw
        raise Refused(415, "unknown_content", "only application/json can be inspected for images")

    async def _rewrite_upload(self, exchange: Exchange, raw: bytes) -> bytes:
        scope, caller = exchange.scope, Caller(exchange.client, exchange.lease.take)
        content_type = find(scope["headers"], b"content-type") or ""
        with self.share(exchange.client), self._span("codefend.purify", exchange):
            check_route = partial(self.check_route, scope)
            terms = self._terms(scope)
            body, exchange.outcome = await rewrite_upload(self.engine, check_route, content_type, raw, terms, caller)
        return body

    def _terms(self, scope: Scope) -> Terms:
        mode = find(scope["headers"], b"x-codefend-policy")
        threshold = find(scope["headers"], b"x-codefend-threshold")
        standing = with_text(self.engine.terms, find(scope["headers"], b"x-codefend-text"))
        if mode is None and threshold is None:
            return standing
        if not self.settings.allow_override:
            raise Refused(403, "override_refused", "this gateway does not let a request choose its policy")
        if mode not in (None, "purify", "detect", "block"):
            raise Refused(400, "invalid_header", "x-codefend-policy must be purify, detect or block")
        try:
            value = standing.threshold if threshold is None else float(threshold)
        except ValueError as error:
            raise Refused(400, "invalid_header", "x-codefend-threshold must be a number") from error
        if mode in ("detect", "block") and value is None:
            raise Refused(400, "invalid_header", f"policy {mode} needs x-codefend-threshold")
        return replace(standing, mode=mode or standing.mode, threshold=value)  # type: ignore[arg-type]

    @contextmanager
    def share(self, client: str) -> Iterator[None]:
        """Count the requests with images of one client. Raises Refused (429) above its share."""
        limit = self.settings.max_in_flight_per_key
        if limit and self._in_flight[client] >= limit:
            message = f"{limit} requests of this key are being purified already"
            raise Refused(429, "too_many_requests", message, retry_after=1)
        self._in_flight[client] += 1
        try:
            yield
        finally:
            self._in_flight[client] -= 1
            if not self._in_flight[client]:
                del self._in_flight[client]

    def _response_headers(self, exchange: Exchange, response: httpx2.Response) -> Headers:
        headers = to_client(response.headers.raw)
        if "x-request-id" not in response.headers:
            headers.append((b"x-request-id", exchange.request_id.encode()))
        return headers + report(
            exchange.outcome,
            purifier=self.engine.worker.name,
            request_id=exchange.request_id,
            scores=self.settings.scores,
            votes=self._votes(exchange),
        )

    async def _stream(self, exchange: Exchange, response: httpx2.Response) -> None:
        """Pass the answer on piece by piece, as raw bytes. An answer that breaks off stays incomplete."""
        headers = self._response_headers(exchange, response)
        exchange.status = response.status_code
        await exchange.send({"type": "http.response.start", "status": response.status_code, "headers": headers})
        try:
            async for chunk in response.stream:  # type: ignore[union-attr]
                await exchange.send({"type": "http.response.body", "body": chunk, "more_body": True})
        except (httpx2.HTTPError, OSError) as error:
            self.meters.upstream_errors.labels("broken").inc()
            exchange.code = "upstream_broken"
            if response.headers.get("content-type", "").startswith("text/event-stream"):
                body = error_body(exchange.api, 502, "upstream_broken", "the upstream broke off")
                event = b"\n\nevent: error\ndata: " + body + b"\n\n"
                await exchange.send({"type": "http.response.body", "body": event, "more_body": True})
            raise Broken from error
        await exchange.send({"type": "http.response.body", "body": b""})

    async def _refuse(self, exchange: Exchange, refusal: Refused) -> None:
        exchange.code = exchange.code or refusal.code
        self.meters.refused.labels(refusal.code).inc()
        if exchange.status:  # the answer has begun: all that is left is to break it off
            return
        exchange.status = refusal.status
        extra = report(None, purifier="", request_id=exchange.request_id)
        extra += [(b"x-codefend-status", b"refused"), (b"x-request-id", exchange.request_id.encode())]
        await send_refusal(refusal, refusal.body(exchange.api, exchange.request_id), exchange.send, extra)

    def _record(self, exchange: Exchange) -> None:
        seconds = time.perf_counter() - exchange.started
        self.meters.requests.labels(exchange.route, str(exchange.status)).inc()
        self.meters.seconds.labels(exchange.route).observe(seconds)
        fields: dict[str, Any] = {
            "request_id": exchange.request_id,
            "method": exchange.scope["method"],
            "path": exchange.path[:200],
            "status": exchange.status,
            "ms": round(seconds * 1000, 2),
        } | client_fields(exchange.scope)
        if exchange.upstream_ms is not None:
            fields["upstream_ms"] = round(exchange.upstream_ms, 2)
        if exchange.code:
            fields["code"] = exchange.code
        if exchange.outcome is not None and exchange.outcome.images:
            fields |= {"images": len(exchange.outcome.images), "purify_ms": round(exchange.outcome.seconds * 1000, 2)}
        log.info("request", extra={"fields": fields})


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _is_json(scope: Scope) -> bool:
    kind, _, parameters = (find(scope["headers"], b"content-type") or "").partition(";")
    if kind.strip().lower() != "application/json":
        return False
    charset = parameters.lower().replace(" ", "").replace('"', "").partition("charset=")[2].partition(";")[0]
    if charset not in ("", "utf-8", "utf8"):
        raise Refused(415, "unknown_content", "JSON must be UTF-8")
    return True
