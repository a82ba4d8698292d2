"""Retries where they are safe, a circuit breaker, and addresses of many providers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import pytest

from codefend.gateway.errors import Refused
from codefend.gateway.options import UpstreamOptions
from codefend.gateway.telemetry import Meters
from codefend.gateway.upstream import Upstream, connect
from codefend.types import CodefendError
from gateway_kit import run

CLOSED = AttributeError("'NoneType' object has no attribute 'setsockopt'")  # httpcore2, when a connection dies at once
STALE = httpx2.RemoteProtocolError("Server disconnected without sending a response.")


def upstream(*outcomes: Any, base: str = "http://up.test/v1", **options: Any) -> tuple[Upstream, list[httpx2.Request]]:
    requests: list[httpx2.Request] = []
    left = list(outcomes)

    def handler(request: httpx2.Request) -> httpx2.Response:
        requests.append(request)
        outcome = left.pop(0) if left else 200
        if isinstance(outcome, Exception):
            raise outcome
        return httpx2.Response(outcome)

    transport = httpx2.MockTransport(handler)
    return Upstream(transport, base, Meters(), UpstreamOptions(**options)), requests


async def send(target: Upstream, method: str = "POST") -> int:
    return (await target.send(target.request(method, "/v1/models", b"", [], b"{}"))).status_code


@pytest.mark.parametrize("error", [httpx2.ConnectError("refused"), httpx2.ConnectTimeout("slow"), CLOSED])
def test_what_the_upstream_never_read_is_sent_again(error: Exception) -> None:
    target, requests = upstream(error, error)
    assert run(send(target)) == 200
    assert len(requests) == 3
    assert "codefend_upstream_retries_total" in target.meters.text().decode()


def test_a_reused_connection_that_ends_without_an_answer_is_replaced_once() -> None:
    target, requests = upstream(STALE)
    assert run(send(target)) == 200
    assert len(requests) == 2
    target, requests = upstream(STALE, STALE)
    with pytest.raises(Refused):
        run(send(target))
    assert len(requests) == 2, "a request that ends a server is not sent to more and more of them"


class _Server:
    """Reads whole requests. Answers the first ``answers`` of each connection, and closes it at the next one."""

    def __init__(self, answers: int, last: int | None = None) -> None:
        self.answers, self.last = answers, last  # ``last``: connections from this one on answer everything
        self.requests = self.connections = 0

    @asynccontextmanager
    async def run(self) -> AsyncIterator[str]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        async with server:
            host, port = server.sockets[0].getsockname()[:2]
            yield f"http://{host}:{port}/v1"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        left = 1000 if self.connections == self.last else self.answers
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                await reader.readexactly(len(b"{}"))
                self.requests += 1
                if not left:
                    return
                left -= 1
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()


def over_the_network(server: _Server, sends: int) -> list[int | str]:
    async def work() -> list[int | str]:
        async with server.run() as base:
            target = Upstream(connect(), base, Meters())
            outcomes: list[int | str] = []
            for _ in range(sends):
                headers = [(b"host", b"up.test"), (b"content-length", b"2")]
                request = target.request("POST", "/v1/chat/completions", b"", headers, b"{}")
                try:
                    response = await target.send(request)
                    await response.aread()
                    outcomes.append(response.status_code)
                except Refused as refusal:
                    outcomes.append(refusal.code)
            await target.aclose()
            return outcomes

    return run(work())


def test_a_post_is_sent_once_to_a_server_that_reads_it_and_dies() -> None:
    server = _Server(answers=0)
    assert over_the_network(server, 1) == ["upstream_unreachable"]
    assert (server.requests, server.connections) == (1, 1)


def test_a_post_on_a_reused_connection_that_ends_is_sent_on_another() -> None:
    server = _Server(answers=1, last=2)
    assert over_the_network(server, 2) == [200, 200]
    assert server.connections == 2


@pytest.mark.parametrize("error", [httpx2.ReadError("gone"), httpx2.ReadTimeout("slow"), httpx2.WriteError("gone")])
def test_what_the_upstream_may_have_done_is_not_done_twice(error: Exception) -> None:
    target, requests = upstream(error)
    with pytest.raises(Refused):
        run(send(target))
    assert len(requests) == 1
    if not isinstance(error, httpx2.TimeoutException):
        target, requests = upstream(error)
        assert run(send(target, "GET")) == 200
        assert len(requests) == 2


def test_retries_do_not_multiply_an_outage() -> None:
    async def work() -> int:
        target, requests = upstream(*[httpx2.ConnectError("refused")] * 1000)
        target._retries_left = 2.0
        for _ in range(20):
            with pytest.raises(Refused):
                await send(target)
        return len(requests)

    assert run(work()) <= 24, "20 requests, 2 retries, and one for every ten requests"


def test_an_upstream_that_keeps_failing_is_left_alone_for_a_while() -> None:
    async def work() -> None:
        target, requests = upstream(*[httpx2.ReadError("gone")] * 3, breaker_failures=3, breaker_s=60)
        for _ in range(3):
            with pytest.raises(Refused) as error:
                await send(target)
            assert error.value.code == "upstream_unreachable"
        with pytest.raises(Refused) as refusal:
            await send(target)
        assert (refusal.value.status, refusal.value.code) == (503, "upstream_unavailable")
        assert 50 < (refusal.value.retry_after or 0) <= 60
        assert len(requests) == 3
        target._open_until = 0.0
        assert await send(target) == 200

    run(work())


@pytest.mark.parametrize(
    ("base", "path", "query", "url"),
    [
        ("http://up.test/v1", "/v1/chat/completions", b"a=1", "http://up.test/v1/chat/completions?a=1"),
        ("https://g.test/v1beta/openai", "/v1/models", b"", "https://g.test/v1beta/openai/models"),
        (
            "https://z.test/openai/deployments/d?api-version=1",
            "/v1/embeddings",
            b"",
            "https://z.test/openai/deployments/d/embeddings?api-version=1",
        ),
        (
            "https://z.test/openai/v1?api-version=1",
            "/v1/models",
            b"a=1",
            "https://z.test/openai/v1/models?api-version=1&a=1",
        ),
    ],
)
def test_addresses(base: str, path: str, query: bytes, url: str) -> None:
    target, _ = upstream(base=base)
    assert str(target.request("POST", path, query, [], None).url) == url


def test_private_certificates_and_proxies(tmp_path: Any) -> None:
    (tmp_path / "ca.pem").write_text("no certificate")
    with pytest.raises(CodefendError, match="cannot read the certificates"):
        connect(tmp_path / "ca.pem")
    with pytest.raises(CodefendError, match="upstream_proxy"):
        connect(proxy="ftp://proxy.test")
    connect(proxy="http://proxy.test:3128")
