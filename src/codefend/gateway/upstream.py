"""Requests to the upstream: connections, keys, retries of what is safe to repeat, and a circuit breaker."""

from __future__ import annotations

import ssl
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx2
from tenacity import AsyncRetrying, RetryCallState, stop_after_attempt, wait_random_exponential

from codefend.gateway.errors import Refused
from codefend.gateway.options import UpstreamOptions
from codefend.gateway.telemetry import Meters
from codefend.types import CodefendError

KEEP_ALIVE_S = 4.0  # below uvicorn's 5 s: most model servers close an idle connection then
_IDEMPOTENT = frozenset({"GET", "HEAD", "DELETE"})
# Events of httpcore2 when a connection is opened for a request, and where the request notes it.
_CONNECTING = frozenset({"connection.connect_tcp.started", "connection.connect_unix_socket.started"})
_FRESH = "codefend_fresh_connection"
_RETRY_SHARE = 0.1  # of the requests may be retries, so that retries never multiply an outage
_RETRY_RESERVE = 10.0  # retries that may come in a row before that share counts


def connect(ca: Path | None = None, proxy: str | None = None) -> httpx2.AsyncHTTPTransport:
    """A transport, not a client: no cookie jar, no redirects, no headers of its own.

    ``ca`` is a PEM file with the certificates to trust, by default the system's. Raises CodefendError.
    """
    limits = httpx2.Limits(max_connections=1000, max_keepalive_connections=200, keepalive_expiry=KEEP_ALIVE_S)
    try:
        trust = ssl.create_default_context(cafile=ca)
    except (OSError, ssl.SSLError) as error:
        raise CodefendError(f"cannot read the certificates in {ca}: {error}") from error
    try:
        return httpx2.AsyncHTTPTransport(trust_env=False, limits=limits, verify=trust, proxy=proxy)
    except (ValueError, httpx2.InvalidURL) as error:
        raise CodefendError(f"upstream_proxy: {error}; expected http://host:port") from error


class Upstream:
    """The server behind the gateway. Errors of the connection become Refused (502, 503, 504)."""

    def __init__(
        self,
        transport: httpx2.AsyncBaseTransport,
        base_url: str,
        meters: Meters,
        options: UpstreamOptions | None = None,
        *,
        key: str | None = None,
    ) -> None:
        self.transport, self.meters, self.key = transport, meters, key
        self.options = options or UpstreamOptions()
        self._base = httpx2.URL(base_url)
        read = self.options.upstream_timeout_s
        connect_s = self.options.connect_timeout_s
        self._timeouts = {"connect": connect_s, "read": read, "write": read, "pool": connect_s}
        self._retries_left = _RETRY_RESERVE
        self._failures, self._open_until = 0, 0.0

    def request(
        self, method: str, path: str, query: bytes, headers: Sequence[tuple[bytes, bytes]], content: bytes | None
    ) -> httpx2.Request:
        """Build a request for a path below ``/v1``, from the path as it was understood here."""
        raw = self._base.raw_path.partition(b"?")[0].rstrip(b"/")
        raw += quote(path.removeprefix("/v1"), safe="/:@!$&'()*+,;=-._~").encode("ascii")
        query = b"&".join(part for part in (self._base.query, query) if part)
        url = self._base.copy_with(raw_path=raw + (b"?" + query if query else b""))
        return httpx2.Request(
            method, url, headers=list(headers), content=content, extensions={"timeout": self._timeouts}
        )

    async def send(self, request: httpx2.Request) -> httpx2.Response:
        """Send, and again where nothing was received and a second time cannot do harm. Raises Refused."""
        if time.monotonic() < self._open_until:
            wait = self._open_until - time.monotonic()
            raise Refused(503, "upstream_unavailable", "the upstream keeps failing; try later", retry_after=wait)
        self._retries_left = min(_RETRY_RESERVE, self._retries_left + _RETRY_SHARE)
        retrying = AsyncRetrying(
            stop=stop_after_attempt(self.options.upstream_retries + 1),
            wait=wait_random_exponential(multiplier=0.05, max=1.0),
            retry=lambda state: self._may_retry(request, state),
            before_sleep=self._count_retry,
            reraise=True,
        )
        try:
            response: httpx2.Response = await retrying(self._send_once, request)
        except (httpx2.HTTPError, OSError) as error:
            raise self._refusal(error) from error
        self._failures = 0
        return response

    async def _send_once(self, request: httpx2.Request) -> httpx2.Response:
        async def trace(event: str, info: Mapping[str, Any]) -> None:
            if event in _CONNECTING:
                request.extensions[_FRESH] = True

        request.extensions |= {"trace": trace, _FRESH: False}
        try:
            return await self.transport.handle_async_request(request)
        except AttributeError as error:  # httpcore2 sets options of a socket that uvloop has closed meanwhile
            raise httpx2.ConnectError("the connection was closed at once", request=request) from error

    def _may_retry(self, request: httpx2.Request, state: RetryCallState) -> bool:
        error = state.outcome.exception() if state.outcome is not None else None
        if error is None:
            return False
        safe = isinstance(error, (httpx2.ConnectError, httpx2.ConnectTimeout))
        # Once: a server that dies of this request looks the same on a reused connection.
        safe = safe or (state.attempt_number == 1 and _was_stale(request, error))
        if request.method in _IDEMPOTENT:
            safe = safe or isinstance(error, (httpx2.NetworkError, httpx2.RemoteProtocolError))
        if not safe or self._retries_left < 1:
            return False
        self._retries_left -= 1
        return True

    def _count_retry(self, state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome is not None else None
        self.meters.upstream_retries.labels(type(error).__name__).inc()

    def _refusal(self, error: Exception) -> Refused:
        kind, status, message = "unreachable", 502, "the upstream cannot be reached"
        if isinstance(error, httpx2.ConnectTimeout):
            kind, status = "connect_timeout", 504
            message = f"no connection within {self.options.connect_timeout_s:g} s"
        elif isinstance(error, httpx2.TimeoutException):
            kind, status, message = "timeout", 504, "the upstream did not answer in time"
        self.meters.upstream_errors.labels(kind).inc()
        self._failures += 1
        if self.options.breaker_failures and self._failures >= self.options.breaker_failures:
            self._failures, self._open_until = 0, time.monotonic() + self.options.breaker_s
        return Refused(status, f"upstream_{kind}", message)

    async def aclose(self) -> None:
        await self.transport.aclose()


def _was_stale(request: httpx2.Request, error: BaseException) -> bool:
    """Whether a reused connection ended without an answer: the server had closed it before it read the request.

    On a connection that was opened for the request, the server may have read it.
    """
    ended = isinstance(error, httpx2.RemoteProtocolError) and "without sending a response" in str(error)
    return ended and not request.extensions.get(_FRESH, True)
