"""Remote images: which addresses are public, pinning, redirects, caps."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import httpx2
import pytest

from codefend.gateway.app import create_app
from codefend.gateway.errors import Refused
from codefend.gateway.fetch import Fetcher, is_public, unpooled_transport
from codefend.gateway.options import FetchOptions
from gateway_kit import Upstream, gateway, image, png, run, settings

PUBLIC = "93.184.215.14"

PRIVATE = [
    "127.0.0.1", "127.255.255.254", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254",
    "100.64.0.1", "100.100.100.200", "168.63.129.16", "192.0.0.192", "192.0.2.1", "198.18.0.1", "203.0.113.5",
    "192.88.99.1", "224.0.0.1", "240.0.0.1", "255.255.255.255",
    "::", "::1", "::127.0.0.1", "::ffff:127.0.0.1", "::ffff:169.254.169.254", "::ffff:0:a00:1", "fe80::1",
    "fc00::1", "fd00:ec2::254", "fec0::1", "ff02::1", "2001:db8::1", "2002:7f00:1::", "2002:a9fe:a9fe::1",
    "fe80::1%eth0", "3fff::1", "5f00::1",
    "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::a00:1", "100::1", "2001:0:7f00:1::", "not an address", "",
]  # fmt: skip


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses_in_every_form(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", [PUBLIC, "8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_public_addresses(address: str) -> None:
    assert is_public(address)


def fetcher(handler: Any = None, answers: dict[str, Sequence[str]] | None = None, **options: Any) -> Fetcher:
    lookups: dict[str, int] = {}
    again = options.pop("again", False)

    async def resolver(host: str) -> Sequence[str]:
        lookups[host] = lookups.get(host, 0) + 1
        assert lookups[host] == 1 or again, "a name is looked up once"
        return (answers or {}).get(host, [PUBLIC])

    limits = {"max_bytes": 1000}
    transport = httpx2.MockTransport(handler or (lambda request: httpx2.Response(200, content=b"image")))
    return Fetcher(FetchOptions(**({"allowed": True} | options)), transport=transport, resolver=resolver, **limits)


def refusal(work: Any) -> Refused:
    with pytest.raises(Refused) as caught:
        run(work)
    return caught.value


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org/a.png", "ftp://example.org/a", "file:///etc/passwd", "//example.org/a", "example.org", "",
        "https://user:pass@example.org/", "https://example.org:8443/", "https:///a", "https://[::1", "gopher://x",
        "https://2130706433/", "https://0x7f000001/", "https://0x7f.1/", "https://0177.0.0.1/", "https://127.1/",
        "https://127.0.0.1/", "https://127.0.0.1./", "https://[::1]/", "https://[::ffff:169.254.169.254]/",
        "https://[64:ff9b::a9fe:a9fe]/", "https://169.254.169.254/latest/meta-data", "https://4294967295/",
        "https://①②⑦.0.0.1/", "https://127。0。0。1/", "https://exa mple.org/", "https://example.org\\@evil/",
    ],
)  # fmt: skip
def test_urls_that_are_never_fetched(url: str) -> None:
    async def no_resolver(host: str) -> Sequence[str]:
        return ["127.0.0.1"]

    def handler(request: httpx2.Request) -> httpx2.Response:
        raise AssertionError("nothing may be sent")

    transport = httpx2.MockTransport(handler)
    fetch = Fetcher(FetchOptions(True), max_bytes=10, transport=transport, resolver=no_resolver)
    error = refusal(fetch(url))
    assert error.code in ("remote_image_refused", "remote_image_failed")
    assert "127.0.0.1" not in error.message


def test_refused_by_default() -> None:
    assert "data:image" in refusal(fetcher(allowed=False)("https://example.org/a.png")).message


@pytest.mark.parametrize("addresses", [["10.0.0.1"], [PUBLIC, "10.0.0.1"], ["::ffff:10.0.0.1"], ["64:ff9b::a00:1"], []])
def test_names_that_lead_inside(addresses: list[str]) -> None:
    error = refusal(fetcher(answers={"evil.test": addresses})("https://evil.test/a.png"))
    assert error.status == 403
    assert "10.0.0.1" not in error.message


def test_the_connection_goes_to_the_address_that_was_checked() -> None:
    requests: list[httpx2.Request] = []

    def handler(request: httpx2.Request) -> httpx2.Response:
        requests.append(request)
        return httpx2.Response(200, content=b"image")

    assert run(fetcher(handler)("https://Example.org/a.png?x=1")) == b"image"
    assert requests[0].url.host == PUBLIC
    assert requests[0].headers["host"] == "example.org"
    assert requests[0].extensions["sni_hostname"] == "example.org"
    assert str(requests[0].url).endswith("/a.png?x=1")
    assert "cookie" not in requests[0].headers


def redirecting(*targets: str) -> Any:
    left = list(targets)

    def handler(request: httpx2.Request) -> httpx2.Response:
        if left:
            return httpx2.Response(302, headers={"location": left.pop(0)})
        return httpx2.Response(200, content=b"image")

    return handler


def test_redirects_are_checked_like_the_first_address() -> None:
    assert run(fetcher(redirecting("/b", "https://b.test/c"), again=True)("https://a.test/")) == b"image"
    for target in ("http://a.test/", "https://127.0.0.1/", "https://inside.test/", "file:///etc/passwd"):
        inside = fetcher(redirecting(target), {"inside.test": ["10.0.0.1"]})
        assert refusal(inside("https://a.test/")).code.startswith("remote_image")
    endless = fetcher(redirecting(*["/again"] * 9), again=True)
    assert "redirects" in refusal(endless("https://a.test/")).message


def test_a_second_answer_of_the_name_server_is_checked_too() -> None:
    answers = iter([[PUBLIC], ["127.0.0.1"]])

    async def rebinding(host: str) -> Sequence[str]:
        return next(answers)

    transport = httpx2.MockTransport(redirecting("/again"))
    fetch = Fetcher(FetchOptions(True), max_bytes=10, transport=transport, resolver=rebinding)
    assert refusal(fetch("https://a.test/")).status == 403


def test_allowed_hosts() -> None:
    fetch = fetcher(hosts=("example.org",), again=True)
    assert run(fetch("https://cdn.example.org/a"))
    assert refusal(fetch("https://notexample.org/a")).status == 403


class Endless(httpx2.AsyncByteStream):
    def __init__(self, pause_s: float) -> None:
        self.pause_s = pause_s

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            await asyncio.sleep(self.pause_s)
            yield b"x" * 100


@pytest.mark.parametrize(
    ("response", "code"),
    [
        (httpx2.Response(200, stream=Endless(0)), "image_too_large"),
        (httpx2.Response(200, stream=Endless(0.3)), "remote_image_failed"),
        (httpx2.Response(404), "remote_image_failed"),
        (httpx2.Response(200, headers={"content-encoding": "gzip"}, content=b""), "remote_image_failed"),
    ],
)
def test_size_time_and_status_are_capped(response: httpx2.Response, code: str) -> None:
    assert refusal(fetcher(lambda request: response, timeout_s=0.5)("https://a.test/")).code == code


def test_through_the_gateway() -> None:
    async def resolver(host: str) -> Sequence[str]:
        return [PUBLIC]

    async def work() -> None:
        upstream = Upstream()
        remote = httpx2.MockTransport(lambda request: httpx2.Response(200, content=png(1)))
        from gateway_kit import Invert

        app = create_app(
            settings(allow_remote_images=True),
            purifier=Invert(),
            transport=upstream.transport,
            fetch_transport=remote,
            resolver=resolver,
        )
        body = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "https://a.test/x.png"}]}]}
        async with gateway(upstream, app=app) as client:
            answer = await client.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        assert b"a.test" not in upstream.requests[0].content
        assert (upstream.images()[0] - (1 - image(1))).abs().max() < 1e-6

    run(work())


# --- budgets and connections ------------------------------------------------------------------------------------------


def test_fetches_at_a_time_are_bounded_for_all_and_for_each_client() -> None:
    async def work() -> None:
        running, most = 0, 0

        async def handler(request: httpx2.Request) -> httpx2.Response:
            nonlocal running, most
            running += 1
            most = max(most, running)
            await asyncio.sleep(0.02)
            running -= 1
            return httpx2.Response(200, content=b"image")

        fetch = fetcher(handler, again=True, concurrent=4)
        await asyncio.gather(*(fetch(f"https://a.test/{i}", "one client") for i in range(12)))
        assert most == 2
        await asyncio.gather(*(fetch(f"https://a.test/{i}", f"client {i}") for i in range(12)))
        assert most == 4
        assert fetch.in_flight == 0

    run(work())


def test_waiting_for_a_fetch_ends() -> None:
    async def work() -> None:
        async def handler(request: httpx2.Request) -> httpx2.Response:
            try:
                await asyncio.sleep(5)
            finally:
                await asyncio.sleep(0.5)  # the first keeps its place until the second has waited long enough
            raise AssertionError

        fetch = fetcher(handler, again=True, concurrent=1, timeout_s=0.2)
        results = await asyncio.gather(*(fetch("https://a.test/", str(i)) for i in range(2)), return_exceptions=True)
        assert sorted(result.code for result in results if isinstance(result, Refused)) == [
            "remote_image_failed",
            "too_many_fetches",
        ]

    run(work())


def test_a_request_that_is_cancelled_while_it_waits_leaves_its_place_to_others() -> None:
    async def work() -> None:
        done = asyncio.Event()

        async def handler(request: httpx2.Request) -> httpx2.Response:
            await done.wait()
            return httpx2.Response(200, content=b"image")

        fetch = fetcher(handler, again=True, concurrent=2, timeout_s=1)
        others = [asyncio.ensure_future(fetch("https://a.test/", name)) for name in ("a", "b")]
        await asyncio.sleep(0.01)
        first, second = (asyncio.ensure_future(fetch("https://a.test/", "c")) for _ in range(2))
        await asyncio.sleep(0.01)
        first.cancel()
        await asyncio.sleep(0.01)
        done.set()
        assert await asyncio.gather(*others, second) == [b"image"] * 3
        assert fetch.in_flight == 0

    run(work())


def test_fetched_bytes_count_in_the_requests_memory() -> None:
    sizes: list[int] = []
    assert run(fetcher()("https://a.test/", "", sizes.append)) == b"image"
    assert sizes == [5]


def test_every_connection_checks_the_name_it_is_for(tmp_path: Path) -> None:
    """Two names at one address: the certificate of the first is no proof for the second."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl here")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    names = ["-subj", "/CN=a.test", "-addext", "subjectAltName=DNS:a.test"]
    command = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *names]
    subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_context.load_cert_chain(certificate, key)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while await reader.readuntil(b"\r\n\r\n"):
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")

    async def ask(transport: httpx2.AsyncBaseTransport, port: int, name: str) -> int:
        request = httpx2.Request(
            "GET", f"https://127.0.0.1:{port}/", headers={"host": name}, extensions={"sni_hostname": name}
        )
        response = await transport.handle_async_request(request)
        await response.aread()
        await response.aclose()
        return response.status_code

    async def work() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=server_context)
        transport = unpooled_transport(verify=ssl.create_default_context(cafile=str(certificate)))
        port = server.sockets[0].getsockname()[1]
        assert await ask(transport, port, "a.test") == 200
        with pytest.raises(httpx2.ConnectError, match="certificate"):
            await ask(transport, port, "b.test")
        await transport.aclose()
        server.close()

    run(work())
