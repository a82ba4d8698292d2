"""Who may ask: the Host header, keys compared in constant time, rates per key, and browsers' requests for the page.

Every refusal is logged and counted like any other answer.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, urlsplit

from limits import RateLimitItem, RateLimitItemPerDay, RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import FixedWindowRateLimiter
from starlette.types import ASGIApp, Receive, Scope, Send

from codefend.gateway.errors import Refused
from codefend.gateway.headers import find
from codefend.gateway.options import AccessOptions
from codefend.gateway.routes import Routes, error_api_of
from codefend.gateway.telemetry import Meters, log
from codefend.gateway.wire import dump

OPEN = frozenset({"/healthz", "/readyz", "/"})  # the page holds no data; the routes it calls need the key
LOOPBACK = ("localhost", "127.0.0.1", "::1")
KEY_HEADER = b"x-codefend-key"
_KEY_HEADERS = (KEY_HEADER, b"authorization", b"x-api-key")
_PROBES = frozenset({"/healthz", "/readyz"})  # of load balancers, which address a machine by number


@dataclass(frozen=True)
class Match:
    """The key of a request: a short digest, the headers that hold it, and its routes if it may not use all."""

    digest: str = ""
    headers: frozenset[bytes] = frozenset()
    routes: Routes | None = None


class Keys:
    """The keys that clients may present; none: everyone may ask. They can be replaced while requests run.

    Routes may stand behind a key: ``KEY chat models``.
    """

    def __init__(self, keys: Sequence[str] = ()) -> None:
        self._routes: dict[bytes, Routes | None] = {}  # by digest of the key
        self.replace(keys)

    def __len__(self) -> int:
        return len(self._routes)

    def replace(self, keys: Sequence[str]) -> None:
        entries = [key.split() for key in keys]
        self._routes = {
            hashlib.sha256(key.encode()).digest(): Routes(routes) if routes else None for key, *routes in entries
        }

    def match(self, headers: Sequence[tuple[bytes, bytes]]) -> Match:
        """Find the request's key. Raises Refused (400, 401)."""
        digests: set[bytes] = set()
        names: set[bytes] = set()
        for name, value in headers:
            if name not in _KEY_HEADERS:
                continue
            key = value[7:].strip() if name == b"authorization" and value[:7].lower() == b"bearer " else value
            digest = hashlib.sha256(key).digest()
            matches = [hmac.compare_digest(digest, known) for known in self._routes]  # all of them, always
            if any(matches):
                digests.add(digest)
                names.add(name)
        if not digests:
            raise Refused(401, "invalid_api_key", "this gateway needs a key: Authorization: Bearer ...")
        if len(digests) > 1:
            raise Refused(400, "invalid_header", "the request holds two different keys of this gateway")
        digest = digests.pop()
        return Match(digest.hex()[:8], frozenset(names), self._routes[digest])


class Access:
    """Pure ASGI. A request that passes has ``scope["codefend.key"]``, a short digest that names its key, and
    ``scope["codefend.client"]``, that or the address.

    ``scope["codefend.key_headers"]`` names the headers that held a key, so that none is passed on;
    ``scope["codefend.routes"]`` are the key's own routes, or None.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: Keys,
        options: AccessOptions,
        meters: Meters,
        verdicts: Mapping[str, Callable[[Refused], Any]] | None = None,
    ) -> None:
        self.app, self.keys, self.options, self.meters = app, keys, options, meters
        self.verdicts = verdicts or {}  # path of a guardrail -> its words for a refusal, which replace the status
        limits = (RateLimitItemPerMinute, options.requests_per_minute), (RateLimitItemPerDay, options.requests_per_day)
        self._limits: list[RateLimitItem] = [kind(count) for kind, count in limits if count]
        self._limiter = FixedWindowRateLimiter(MemoryStorage())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        try:
            self._admit(scope)
        except Refused as refusal:
            await self._refuse(refusal, scope, send)
            return
        await self.app(scope, receive, send)

    def _admit(self, scope: Scope) -> None:
        path = scope.get("path", "")
        address = scope["client"][0] if scope.get("client") else ""
        scope["codefend.address"] = visible_address(address, self.options.log_client)
        scope["codefend.key"] = ""
        _check_framing(scope)
        if path not in _PROBES:
            self._check_host(scope)
        if path.startswith("/page/"):
            _check_same_site(scope)
        match = self.keys.match(scope["headers"]) if self.keys and path not in OPEN else Match()
        scope["codefend.key"], scope["codefend.key_headers"] = match.digest, match.headers
        scope["codefend.routes"] = match.routes
        scope["codefend.client"] = scope["codefend.key"] or address
        works = path.startswith("/page/") and scope.get("method") == "POST"
        if works or path.startswith("/v1/") or path in self.verdicts:
            self._check_rate(scope["codefend.client"])

    def _check_host(self, scope: Scope) -> None:
        """A page elsewhere whose name leads here (DNS rebinding) sends its own name."""
        host = find(scope["headers"], b"host") or ""
        name = (_parse_address("host", f"//{host}").hostname or "") if host else ""
        if self.options.hosts and name.rstrip(".") not in self.options.hosts:
            message = f"the host {name[:60]!r} is not served here; the operator's --allowed-hosts name it"
            raise Refused(421, "unknown_host", message)

    def _check_rate(self, client: str) -> None:
        for limit in self._limits:
            if not self._limiter.hit(limit, client):
                reset = self._limiter.get_window_stats(limit, client).reset_time
                message = f"the limit is {limit.amount} requests per {limit.GRANULARITY.name}"
                raise Refused(429, "rate_limit", message, retry_after=max(1.0, reset - time.time()))

    async def _refuse(self, refusal: Refused, scope: Scope, send: Send) -> None:
        self.meters.refused.labels(refusal.code).inc()
        path = str(scope.get("path", ""))
        fields = {"path": path[:200], "status": refusal.status, "code": refusal.code}
        log.info("request", extra={"fields": fields | client_fields(scope)})
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 4401})
            return
        if path in self.verdicts:
            await send_verdict(dump(self.verdicts[path](refusal)), send)
        else:
            await send_refusal(refusal, refusal.body(error_api_of(path)), send)


def client_fields(scope: Scope) -> dict[str, Any]:
    """The client, for the logs: the key's short digest and, as the operator chose, the address."""
    fields = {"key": scope.get("codefend.key"), "client": scope.get("codefend.address")}
    return {name: value for name, value in fields.items() if value}


def visible_address(address: str, policy: str) -> str:
    """The address as the logs may hold it; masked: without the last 8 bits of IPv4, or the last 80 of IPv6."""
    if policy == "full" or not address:
        return address
    if policy == "none":
        return ""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return ""
    return str(ipaddress.ip_network(f"{ip}/{24 if ip.version == 4 else 48}", strict=False).network_address)


async def send_verdict(answer: bytes, send: Send) -> None:
    """Answer a guardrail's caller. A verdict has status 200, whatever it is."""
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(answer)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": answer})


async def send_refusal(refusal: Refused, body: bytes, send: Send, extra: Sequence[tuple[bytes, bytes]] = ()) -> None:
    """Answer with a refusal."""
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *extra]
    if refusal.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if refusal.retry_after is not None:
        headers.append((b"retry-after", str(refusal.retry_seconds).encode()))
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _check_framing(scope: Scope) -> None:
    """Refuse two lengths of one body (RFC 9112, 6.3): a proxy in front may have believed the other one."""
    names = {name for name, _ in scope["headers"]}
    if {b"content-length", b"transfer-encoding"} <= names:
        raise Refused(400, "invalid_header", "content-length and transfer-encoding exclude each other")


def _parse_address(header: str, value: str) -> SplitResult:
    """Split the address in a header. Raises Refused (400) for a malformed one."""
    try:
        return urlsplit(value)
    except ValueError as error:
        raise Refused(400, "invalid_header", f"the header {header} holds a malformed address") from error


def _check_same_site(scope: Scope) -> None:
    """Refuse what another site's page makes a browser send: its requests need no JSON type unless it may ask first."""
    headers = scope["headers"]
    if find(headers, b"sec-fetch-site") in ("cross-site", "same-site"):
        raise Refused(403, "cross_site", "the page's routes answer to the page alone")
    origin = find(headers, b"origin")
    if origin is not None and _parse_address("origin", origin).netloc != find(headers, b"host"):
        raise Refused(403, "cross_site", "the page's routes answer to the page alone")
    kind = (find(headers, b"content-type") or "").partition(";")[0].strip().lower()
    if scope.get("method") != "GET" and kind != "application/json":
        raise Refused(415, "unknown_content", "only application/json is read here")
