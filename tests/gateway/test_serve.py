"""HTTP as it arrives on a socket: trailers, upgrades, smuggling, and the default clients of other languages."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from codefend.gateway import serve
from codefend.gateway.app import create_app
from gateway_kit import CHAT, Invert, Upstream, chat, png, served, settings

KEY = "sesame-open"
JSON = "content-type: application/json\r\n"


@pytest.fixture(scope="module")
def upstream() -> Upstream:
    return Upstream()


@pytest.fixture(scope="module")
def base(upstream: Upstream) -> Iterator[str]:
    app = create_app(settings(api_keys=KEY), purifier=Invert(), transport=upstream.transport)
    with served(app) as url:
        yield url


def send(base: str, head: str, body: bytes) -> str:
    host, port = base.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        start = f"POST {CHAT} HTTP/1.1\r\nhost: gateway.test\r\nconnection: close\r\n"
        connection.sendall((start + head + "\r\n").encode() + body)
        answer = b""
        while piece := connection.recv(1 << 16):
            answer += piece
    return answer.decode()


def chunked(body: bytes, trailers: str = "") -> bytes:
    return f"{len(body):x}\r\n".encode() + body + f"\r\n0\r\n{trailers}\r\n".encode()


BODY = json.dumps(chat(png(1))).encode()
LENGTH = f"content-length: {len(BODY)}\r\n"
CHUNKED = "transfer-encoding: chunked\r\n"


def test_trailers_are_no_headers(base: str, upstream: Upstream) -> None:
    trailers = "x-user-id: admin\r\ncookie: session=1\r\n"
    answer = send(base, f"{JSON}{CHUNKED}x-api-key: {KEY}\r\ntrailer: x-user-id\r\n", chunked(BODY, trailers))
    assert answer.startswith("HTTP/1.1 200")
    names = set(upstream.requests[-1].headers)
    assert not names & {"x-user-id", "cookie", "trailer"}


def test_a_key_in_a_trailer_is_none(base: str) -> None:
    assert send(base, JSON + CHUNKED, chunked(BODY, f"x-api-key: {KEY}\r\n")).startswith("HTTP/1.1 401")


def test_an_offered_upgrade_does_not_lose_the_body(base: str, upstream: Upstream) -> None:
    offer = "connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAEAAEAA\r\n"
    assert send(base, f"{JSON}{LENGTH}{offer}x-api-key: {KEY}\r\n", BODY).startswith("HTTP/1.1 200")
    assert len(upstream.images()) == 1
    assert not {"upgrade", "http2-settings"} & set(upstream.requests[-1].headers)


@pytest.mark.parametrize(
    "head",
    [
        f"{LENGTH}{CHUNKED}",
        f"{LENGTH}content-length: 5\r\n",
        "transfer-encoding: chunked, identity\r\n",
        "content-length: +5\r\n",
        f"{LENGTH}x : y\r\n",
        f"{LENGTH} folded: y\r\n",
        f"{LENGTH}x: a\0b\r\n",
    ],
)
def test_ambiguous_requests_are_refused(base: str, upstream: Upstream, head: str) -> None:
    before = len(upstream.requests)
    answer = send(base, f"{JSON}x-api-key: {KEY}\r\n{head}", BODY)
    assert answer.startswith("HTTP/1.1 4"), answer[:80]
    assert len(upstream.requests) == before


@pytest.mark.parametrize(
    ("proxies", "status"), [("", 429), ("192.0.2.0/24", 429), ("127.0.0.1", 200), ("::1,127.0.0.0/8", 200)]
)
def test_the_client_is_what_a_trusted_proxy_says_and_nobody_else(proxies: str, status: int) -> None:
    loaded = settings(requests_per_minute=1, trusted_proxies=proxies)
    app = create_app(loaded, purifier=Invert(), transport=Upstream().transport)
    with served(app, **serve.proxy_options(loaded)) as base:
        answers = [
            send(base, f"{JSON}{LENGTH}x-forwarded-for: 198.51.100.{i}\r\n", BODY).split(maxsplit=2)[1]
            for i in range(2)
        ]
    assert answers == ["200", str(status)]


def exchange(base: str, *pieces: tuple[float, bytes]) -> tuple[bytes, float]:
    """Send pieces, each after a pause; what the gateway sends until it closes the connection, and the seconds."""
    host, port = base.removeprefix("http://").split(":")
    start, answer = time.monotonic(), b""
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        for pause, piece in pieces:
            time.sleep(pause)
            try:
                connection.sendall(piece)
            except OSError:
                break
        while received := connection.recv(1 << 16):
            answer += received
    return answer, time.monotonic() - start


HEAD = f"POST {CHAT} HTTP/1.1\r\nhost: gateway.test\r\n{JSON}{LENGTH}x-api-key: {KEY}\r\n".encode()
PROBE = b"GET /healthz HTTP/1.1\r\nhost: gateway.test\r\n\r\n"


@pytest.mark.parametrize("pieces", [[], [(0, HEAD)], [(0.1, HEAD[i : i + 1]) for i in range(9)]])
def test_a_connection_without_a_whole_header_is_closed(
    base: str, pieces: list[tuple[float, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "HEADER_S", 0.5)
    answer, seconds = exchange(base, *pieces)
    assert answer == b""
    assert 0.4 < seconds < 5


@pytest.mark.parametrize("pieces", [[(0, PROBE + HEAD)], [(0, PROBE), (0.7, HEAD), (0, b"x-a: b\r\n")]])
def test_the_header_of_a_later_request_has_a_deadline_as_well(
    base: str, pieces: list[tuple[float, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "HEADER_S", 0.5)
    answer, seconds = exchange(base, *pieces)
    assert answer.startswith(b"HTTP/1.1 200")
    assert answer.count(b"HTTP/1.1") == 1
    assert 0.4 < seconds - sum(pause for pause, _ in pieces) < 5


def test_kept_connections_and_slow_bodies_outlast_the_deadline_of_headers(
    base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "HEADER_S", 0.5)
    last = HEAD + b"connection: close\r\n\r\n"
    answer, _ = exchange(base, (0, HEAD + b"\r\n"), (0.7, BODY), (0.7, last), (0.7, BODY))
    assert answer.count(b"HTTP/1.1 200") == 2


JAVA = """
import java.net.URI;
import java.net.http.*;
import java.nio.file.*;
public class Ask {
    public static void main(String[] a) throws Exception {
        var request = HttpRequest.newBuilder(URI.create(a[0])).header("content-type", "application/json")
            .header("x-api-key", a[1]).POST(HttpRequest.BodyPublishers.ofFile(Path.of(a[2]))).build();
        System.out.println(HttpClient.newHttpClient().send(request, HttpResponse.BodyHandlers.ofString()).statusCode());
    }
}
"""


@pytest.mark.slow
def test_the_default_client_of_java_works(base: str, upstream: Upstream, tmp_path: Path) -> None:
    java = shutil.which("java")
    if java is None or shutil.which("javac") is None:
        pytest.skip("no Java compiler here")
    (tmp_path / "Ask.java").write_text(JAVA)
    (tmp_path / "body.json").write_bytes(BODY)
    command = [java, str(tmp_path / "Ask.java"), base + CHAT, KEY, str(tmp_path / "body.json")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "200", result.stderr
    assert len(upstream.images()) == 1
