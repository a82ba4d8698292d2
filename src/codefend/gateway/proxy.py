"""``/v1/*``: read, rewrite, send on, stream back. Pure ASGI, so that a request without images costs little."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import httpx2
from starlette.types import Receive, Scope, Send

from codefend.gateway.config import Settings
from codefend.gateway.engine import Engine, Outcome, Terms
from codefend.gateway.errors import Api, Refused, error_body
from codefend.gateway.headers import find, report, to_client, to_upstream
from codefend.gateway.telemetry import Meters, Tracer, log
from codefend.gateway.wire import ROUTES, api_of, form_of


class ClientGone(Exception):
    """The client has closed the connection."""


class Broken(Exception):
    """The upstream broke off after the answer had begun."""


_REQUEST_ID = re.compile(r"[\w.-]{1,64}\Z", re.ASCII)
_UNSEEN = ("/v1/batches", "/v1/files", "/v1/uploads")  # what they carry is read later, by somebody else


@dataclass
class Exchange:
    """One request on its way."""

    scope: Scope
    send: Send
    api: Api
    request_id: str
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
        return self.path if self.path in ROUTES else "/v1/*"

    @property
    def trace(self) -> dict[str, str]:
        """The caller's ``traceparent`` and ``tracestate``."""
        pairs = self.scope["headers"]
        return {key.decode("latin-1"): value.decode("latin-1") for key, value in pairs if key.startswith(b"trace")}


class Proxy:
    """The ASGI application behind ``/v1``."""

    def __init__(
        self,
        engine: Engine,
        settings: Settings,
        meters: Meters,
        *,
        transport: httpx2.AsyncBaseTransport,
        base_url: str,
    ) -> None:
        self.engine, self.settings, self.meters, self.transport = engine, settings, meters, transport
        self.base_url = httpx2.URL(base_url)
        self.tracer = Tracer()
        secret = settings.upstream_api_key
        self._upstream_key = None if secret is None else secret.get_secret_value()
        self._timeouts = {
            "connect": settings.connect_timeout_s,
            "read": settings.upstream_timeout_s,
            "write": settings.upstream_timeout_s,
            "pool": settings.connect_timeout_s,
        }
        self._in_flight: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = next((value for key, value in scope["headers"] if key == b"x-request-id"), b"").decode("latin-1")
        request_id = given if _REQUEST_ID.match(given) else secrets.token_hex(8)
        exchange = Exchange(scope, send, form_of(scope["path"]), request_id)
        self.meters.in_flight.inc()
        try:
            await self._guarded(exchange, receive)
        finally:
            self.meters.in_flight.dec()
            self._note(exchange)

    async def _guarded(self, exchange: Exchange, receive: Receive) -> None:
        try:
            async with asyncio.timeout(self.settings.total_timeout_s):
                raw = await self._body(exchange, receive)
                await self._until_gone(self._answer(exchange, raw), receive)
        except Refused as refusal:
            await self._refuse(exchange, refusal)
        except TimeoutError:
            await self._refuse(exchange, Refused(504, "timeout", "the exchange took too long"))
        except ClientGone:
            self.meters.disconnects.inc()
            exchange.code = "client_gone"
        except Broken:
            pass  # returning without the end of the answer makes the server close the connection
        except Exception as error:  # fail closed: whatever went wrong, nothing was passed on unseen
            log.exception("internal error", extra={"fields": {"request_id": exchange.request_id}})
            await self._refuse(exchange, Refused(500, "internal_error", f"internal error ({type(error).__name__})"))

    async def _body(self, exchange: Exchange, receive: Receive) -> bytes:
        limit, headers = self.settings.max_body_bytes, exchange.scope["headers"]
        length = find(headers, b"content-length")
        too_large = Refused(413, "body_too_large", f"the body is over the limit of {limit:,} bytes")
        if length is not None and length.isdigit() and int(length) > limit:
            raise too_large
        parts: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            part = message.get("body", b"")
            size += len(part)
            if size > limit:
                raise too_large
            parts.append(part)
            if not message.get("more_body", False):
                return parts[0] if len(parts) == 1 else b"".join(parts)

    async def _until_gone(self, work: Any, receive: Receive) -> None:
        """Do the work unless the client leaves; then cancel it, and with it the request to the upstream."""
        working = asyncio.ensure_future(work)
        watching = asyncio.ensure_future(_disconnect(receive))
        try:
            await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise ClientGone
            working.result()
        finally:
            for task in (working, watching):
                task.cancel()
            await asyncio.gather(working, watching, return_exceptions=True)

    async def _answer(self, exchange: Exchange, raw: bytes) -> None:
        body = await self._rewritten(exchange, raw)
        scope, settings = exchange.scope, self.settings
        headers = to_upstream(
            scope["headers"], key_header=scope.get("codefend.key_header"), upstream_key=self._upstream_key
        )
        with self.tracer.span("codefend.upstream", exchange.trace, route=exchange.route) as onward:
            if onward:
                headers = [pair for pair in headers if pair[0].decode("latin-1") not in onward]
                headers += [(key.encode(), value.encode()) for key, value in onward.items()]
            request = httpx2.Request(
                scope["method"],
                self._target(scope),
                headers=headers,
                content=body if body or scope["method"] in ("POST", "PUT", "PATCH") else None,
                extensions={"timeout": self._timeouts},
            )
            start = time.perf_counter()
            response = await self._reach(request, settings.connect_timeout_s)
            exchange.upstream_ms = (time.perf_counter() - start) * 1000
            try:
                await self._stream(exchange, response)
            finally:
                await response.aclose()

    async def _rewritten(self, exchange: Exchange, raw: bytes) -> bytes:
        """The body to send: the original bytes when nothing in them had to change."""
        scope = exchange.scope
        _check_path(scope["path"])
        if not raw and not scope["path"].startswith(_UNSEEN):
            return raw
        self._check_content(scope, raw)
        if find(scope["headers"], b"content-type") is None or _is_json(scope):
            terms = self._terms(scope)
            with self._share(scope), self.tracer.span("codefend.purify", exchange.trace, route=exchange.route):
                body, exchange.outcome = await self.engine.rewrite_bytes(api_of(scope["path"]), raw, terms)
            return body
        return raw

    def _check_content(self, scope: Scope, raw: bytes) -> None:
        """Refuse bodies that cannot be looked into."""
        if self.settings.allow_uploads and api_of(scope["path"]) == "other":
            return
        encoding = find(scope["headers"], b"content-encoding")
        if encoding not in (None, "", "identity"):
            raise Refused(415, "unknown_content", "send the body without content-encoding")
        if scope["path"].startswith(_UNSEEN) and scope["method"] not in ("GET", "HEAD", "DELETE"):
            raise Refused(403, "uploads_refused", "files and batches cannot be inspected and are not passed on here")
        if raw and not _is_json(scope) and not scope["path"].startswith("/v1/audio/"):
            raise Refused(415, "unknown_content", "only application/json can be inspected for images")

    def _terms(self, scope: Scope) -> Terms:
        mode = find(scope["headers"], b"x-codefend-policy")
        threshold = find(scope["headers"], b"x-codefend-threshold")
        standing = self.engine.terms
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
        return Terms(mode or standing.mode, value)  # type: ignore[arg-type]

    @contextmanager
    def _share(self, scope: Scope) -> Iterator[None]:
        """Count what one key keeps busy. Raises Refused (429) above its share."""
        limit, key = self.settings.max_in_flight_per_key, scope.get("codefend.key", "")
        if limit and self._in_flight[key] >= limit:
            message = f"{limit} requests of this key are being purified already"
            raise Refused(429, "too_many_requests", message, retry_after=1)
        self._in_flight[key] += 1
        try:
            yield
        finally:
            self._in_flight[key] -= 1
            if not self._in_flight[key]:
                del self._in_flight[key]

    async def ask(self, path: str, body: bytes) -> httpx2.Response:
        """Send JSON of the gateway's own to the upstream and read the answer. Raises Refused."""
        headers: list[tuple[bytes, bytes]] = [(b"content-type", b"application/json")]
        headers = to_upstream(headers, key_header=None, upstream_key=self._upstream_key)
        url = self._target({"path": path, "query_string": b""})
        request = httpx2.Request("POST", url, headers=headers, content=body, extensions={"timeout": self._timeouts})
        response = await self._reach(request, self.settings.connect_timeout_s)
        try:
            await response.aread()
        finally:
            await response.aclose()
        return response

    def _target(self, scope: Scope) -> httpx2.URL:
        # Built from the path as it was understood here, so that the upstream cannot understand another one.
        path = quote(scope["path"].removeprefix("/v1"), safe="/:@!$&'()*+,;=-._~")
        raw = self.base_url.raw_path.rstrip(b"/") + path.encode("ascii")
        if scope.get("query_string"):
            raw += b"?" + scope["query_string"]
        return self.base_url.copy_with(raw_path=raw)

    async def _reach(self, request: httpx2.Request, connect_s: float) -> httpx2.Response:
        try:
            return await self.transport.handle_async_request(request)
        except httpx2.ConnectTimeout as error:
            raise self._upstream_error("connect_timeout", 504, f"no connection within {connect_s:g} s") from error
        except httpx2.TimeoutException as error:
            raise self._upstream_error("timeout", 504, "the upstream did not answer in time") from error
        except (httpx2.HTTPError, OSError) as error:
            raise self._upstream_error("unreachable", 502, "the upstream cannot be reached") from error

    def _upstream_error(self, kind: str, status: int, message: str) -> Refused:
        self.meters.upstream_errors.labels(kind).inc()
        return Refused(status, f"upstream_{kind}", message)

    async def _stream(self, exchange: Exchange, response: httpx2.Response) -> None:
        """Pass the answer on piece by piece, as raw bytes. An upstream that dies halfway is not made to look whole."""
        headers = to_client(response.headers.raw)
        headers += report(exchange.outcome, purifier=self.engine.worker.name, request_id=exchange.request_id)
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
        body = error_body(
            exchange.api,
            refusal.status,
            refusal.code,
            refusal.message,
            where=refusal.where,
            request_id=exchange.request_id,
        )
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        if refusal.retry_after is not None:
            headers.append((b"retry-after", str(max(1, round(refusal.retry_after))).encode()))
        headers += report(None, purifier="", request_id=exchange.request_id)
        headers.append((b"x-codefend-status", b"refused"))
        await exchange.send({"type": "http.response.start", "status": refusal.status, "headers": headers})
        await exchange.send({"type": "http.response.body", "body": body})

    def _note(self, exchange: Exchange) -> None:
        seconds = time.perf_counter() - exchange.started
        self.meters.requests.labels(exchange.route, str(exchange.status)).inc()
        self.meters.seconds.labels(exchange.route).observe(seconds)
        fields: dict[str, Any] = {
            "request_id": exchange.request_id,
            "method": exchange.scope["method"],
            "path": exchange.path,
            "status": exchange.status,
            "ms": round(seconds * 1000, 2),
        }
        if exchange.upstream_ms is not None:
            fields["upstream_ms"] = round(exchange.upstream_ms, 2)
        if exchange.code:
            fields["code"] = exchange.code
        if exchange.outcome is not None and exchange.outcome.images:
            fields |= {"images": len(exchange.outcome.images), "purify_ms": round(exchange.outcome.seconds * 1000, 2)}
            for image in exchange.outcome.images:
                kind = "cached" if image.cached else "purified" if image.purified else "reencoded"
                self.meters.images.labels(kind).inc()
        log.info("request", extra={"fields": fields})


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _check_path(path: str) -> None:
    """Refuse paths that an upstream could resolve to another route than the one that was checked."""
    if (
        not path.isprintable()
        or "\\" in path
        or any(part in ("", ".", "..") for part in path.split("/")[1:-1])
        or path.endswith(("/.", "/.."))
    ):
        raise Refused(400, "invalid_path", "the path is not in its plain form")


def _is_json(scope: Scope) -> bool:
    kind, _, parameters = (find(scope["headers"], b"content-type") or "").partition(";")
    if kind.strip().lower() != "application/json":
        return False
    charset = parameters.lower().replace(" ", "").replace('"', "").partition("charset=")[2].partition(";")[0]
    if charset not in ("", "utf-8", "utf8"):
        raise Refused(415, "unknown_content", "JSON must be UTF-8")
    return True
