"""TLS on both sides, with certificates made here: clients to the gateway, the gateway to its upstream, and a proxy."""

from __future__ import annotations

import signal
import socket
import socketserver
import ssl
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import httpx2
import pytest
import trustme
import uvicorn

from codefend.gateway.app import create_app
from codefend.gateway.errors import Refused
from codefend.gateway.serve import _reload_on_sighup, tls_options
from codefend.gateway.telemetry import Meters
from codefend.gateway.upstream import Upstream, connect
from codefend.types import CodefendError
from gateway_kit import CHAT, Invert, chat, png, run, served, settings
from gateway_kit import Upstream as Recorder


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def ca(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tls") / "ca.pem"
    authority.cert_pem.write_to_path(str(path))
    return path


@pytest.fixture(scope="module")
def certificate(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tls")
    issued = authority.issue_cert("127.0.0.1")
    issued.private_key_pem.write_to_path(str(folder / "key.pem"))
    issued.cert_chain_pems[0].write_to_path(str(folder / "cert.pem"))
    return folder / "cert.pem", folder / "key.pem"


@pytest.fixture(scope="module")
def base(certificate: tuple[Path, Path]) -> Iterator[str]:
    """A gateway that serves HTTPS by its own settings."""
    given = settings(tls_cert=certificate[0], tls_key=certificate[1])
    with served(create_app(given, purifier=Invert(), transport=Recorder().transport), **tls_options(given)) as url:
        yield url


def test_the_gateway_serves_https(base: str, ca: Path) -> None:
    trust = ssl.create_default_context(cafile=ca)
    with httpx2.Client(verify=trust, trust_env=False) as client:
        answer = client.post(base + CHAT, json=chat(png(1)))
    assert (answer.status_code, answer.headers["x-codefend-status"]) == (200, "purified")
    with httpx2.Client(trust_env=False) as client, pytest.raises(httpx2.ConnectError):
        client.get(base + "/healthz")


def test_certificate_and_key_are_checked_before_the_start(certificate: tuple[Path, Path], tmp_path: Path) -> None:
    assert tls_options(settings()) == {}
    with pytest.raises(CodefendError, match="given together"):
        settings(tls_cert=certificate[0])
    for wrong in (tmp_path / "missing.pem", certificate[1]):
        with pytest.raises(CodefendError, match="cannot serve HTTPS with"):
            tls_options(settings(tls_cert=wrong, tls_key=certificate[1]))


def served_certificate(context: ssl.SSLContext, trust: ssl.SSLContext) -> bytes | None:
    """What a server with this context shows to a client, by a handshake in memory."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = trust.wrap_bio(down, up, server_hostname="127.0.0.1")
    server = context.wrap_bio(up, down, server_side=True)
    for side in (client, server) * 4:
        with suppress(ssl.SSLWantReadError):
            side.do_handshake()
    return client.getpeercert(binary_form=True)


def test_a_renewed_certificate_is_used_after_sighup(authority: trustme.CA, ca: Path, tmp_path: Path) -> None:
    def issue() -> None:
        issued = authority.issue_cert("127.0.0.1")
        issued.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
        issued.cert_chain_pems[0].write_to_path(str(tmp_path / "cert.pem"))

    issue()
    given, trust = (
        settings(tls_cert=tmp_path / "cert.pem", tls_key=tmp_path / "key.pem"),
        ssl.create_default_context(cafile=ca),
    )
    app = create_app(given, purifier=Invert())
    config = uvicorn.Config(app, **tls_options(given))
    config.load()
    assert config.ssl is not None
    before, handler = served_certificate(config.ssl, trust), signal.getsignal(signal.SIGHUP)
    issue()
    try:
        _reload_on_sighup(app, config, lambda: given)
        signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, handler)
    after = served_certificate(config.ssl, trust)
    assert before
    assert after
    assert before != after


async def ask(base: str, **options: Any) -> int:
    upstream = Upstream(connect(**options), f"{base}/v1", Meters())
    try:
        response = await upstream.send(upstream.request("POST", CHAT, b"", [], b'{"messages": []}'))
        await response.aread()
        return response.status_code
    finally:
        await upstream.aclose()


def test_the_upstream_may_have_a_certificate_of_a_private_authority(base: str, ca: Path) -> None:
    assert run(ask(base, ca=ca)) == 200
    with pytest.raises(Refused) as refusal:
        run(ask(base))
    assert refusal.value.code == "upstream_unreachable"


class Tunnel(socketserver.BaseRequestHandler):
    """One connection of an HTTP proxy that tunnels."""

    asked: ClassVar[list[str]] = []

    def handle(self) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            head += self.request.recv(4096)
        self.asked.append(head.split(b"\r\n")[0].decode())
        method, target, _ = self.asked[-1].split()
        assert method == "CONNECT"
        host, port = target.rsplit(":", 1)
        with socket.create_connection((host, int(port)), 10) as server:
            self.request.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            back = threading.Thread(target=pump, args=(server, self.request))
            back.start()
            pump(self.request, server)
            back.join()


def pump(source: socket.socket, sink: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            sink.sendall(data)
    except OSError:
        pass
    finally:
        with suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


def test_requests_to_the_upstream_go_through_its_proxy(base: str, ca: Path) -> None:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Tunnel) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            assert run(ask(base, ca=ca, proxy=address)) == 200
            assert Tunnel.asked == [f"CONNECT {base.removeprefix('https://')} HTTP/1.1"]
            with pytest.raises(Refused):  # the tunnel does not stand for the server's identity
                run(ask(base, proxy=address))
        finally:
            server.shutdown()
