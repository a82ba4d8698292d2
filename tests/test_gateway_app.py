"""The gateway over its ASGI surface: nothing original passes, the rest passes untouched, streams stay streams."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest
import torch

from codefend import images
from codefend.gateway.app import create_app
from codefend.gateway.telemetry import Tracer
from codefend.types import UserError
from gateway_kit import Driver, Invert, Upstream, b64, chat, gateway, picture, png, run, settings, url

CHAT = "/v1/chat/completions"
A, B = png(1), png(2)


def responses_body() -> dict[str, Any]:
    tool = {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_image", "image_url": url(B)}]}
    user = {"role": "user", "content": [{"type": "input_image", "image_url": url(A), "detail": "high"}]}
    return {"model": "m", "input": [user, tool], "store": False}


def messages_body() -> dict[str, Any]:
    block = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": b64(A)}}
    inner = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": b64(B)}}
    result = {"type": "tool_result", "tool_use_id": "t", "content": [inner]}
    return {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": [block, result]}]}


@pytest.mark.parametrize(
    ("path", "body"),
    [(CHAT, chat(A, B)), ("/v1/responses", responses_body()), ("/v1/messages", messages_body())],
)
def test_every_image_is_replaced_and_nothing_original_passes(path: str, body: Any) -> None:
    async def work() -> None:
        upstream = Upstream()
        async with gateway(upstream) as client:
            answer = await client.post(f"{path}?a=1", json=body, headers={"x-request-id": "r-1"})
        assert answer.json() == {"ok": True}
        assert answer.headers["x-upstream"] == "yes"
        assert not upstream.saw(A, B)
        torch.testing.assert_close(torch.stack(upstream.pictures()), 1 - torch.stack([picture(1), picture(2)]))
        assert str(upstream.requests[0].url) == f"http://upstream.test:9{path}?a=1"
        headers = answer.headers
        assert headers["x-codefend-images"] == "2"
        assert headers["x-codefend-purifier"] == "invert"
        assert headers["x-codefend-status"] == "purified"
        assert headers["x-codefend-cache"] == "miss,miss"
        assert headers["x-codefend-request-id"] == "r-1"
        assert len(headers["x-codefend-score"].split(",")) == 2
        assert float(headers["x-codefend-ms"]) > 0

    run(work())


def test_images_find_their_places_in_any_order_of_keys() -> None:
    async def work() -> None:
        upstream = Upstream()
        body = messages_body()
        block = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": b64(png(7))}}
        async with gateway(upstream) as client:
            await client.post("/v1/messages", json=body | {"system": [block]})
        assert not upstream.saw(A, B, png(7))
        data = upstream.body["system"][0]["source"]["data"]
        torch.testing.assert_close(images.load(f"data:image/png;base64,{data}").pixels, 1 - picture(7))
        assert len(upstream.pictures()) == 3

    run(work())


@pytest.mark.parametrize(
    ("method", "path", "raw"),
    [
        ("POST", CHAT, b'{ "messages" : [{"role":"user","content":"h\\u00e9llo"}], "model":"m" , "seed": 1e2}'),
        ("POST", "/v1/embeddings", b'{"input": ["a",  "b"]}'),
        ("GET", "/v1/models", b""),
        ("DELETE", "/v1/responses/r_1", b""),
        ("POST", "/v1/responses/r_1/cancel", b""),
    ],
)
def test_requests_without_images_pass_byte_for_byte(method: str, path: str, raw: bytes) -> None:
    async def work() -> None:
        upstream = Upstream()
        async with gateway(upstream) as client:
            kind = {"content-type": "application/json"} if raw else {}
            answer = await client.request(method, path, content=raw, headers=kind | {"authorization": "Bearer up"})
        assert answer.status_code == 200
        sent = upstream.requests[0]
        assert (sent.method, sent.url.path, sent.content) == (method, path, raw)
        assert sent.headers["authorization"] == "Bearer up"
        assert sent.headers["host"] == "upstream.test:9"
        assert "x-codefend-images" not in answer.headers

    run(work())


def test_upstream_errors_and_encodings_pass_as_they_are() -> None:
    import gzip

    squeezed = gzip.compress(b'{"error": "busy"}')

    def handler(request: httpx2.Request) -> httpx2.Response:
        headers = {"content-encoding": "gzip", "set-cookie": "a=b", "connection": "x-hop", "x-hop": "1"}
        return httpx2.Response(429, stream=httpx2.ByteStream(squeezed), headers=headers)

    async def work() -> None:
        upstream = Upstream(handler=handler)
        async with gateway(upstream) as client:
            for _ in range(2):
                answer = await client.post(CHAT, json=chat())
        assert answer.status_code == 429
        assert answer.json() == {"error": "busy"}
        assert answer.headers["set-cookie"] == "a=b"
        assert "x-hop" not in answer.headers
        assert upstream.requests[1].headers.get("cookie") == "a=b", "the client's own jar"

    run(work())


# --- streaming -------------------------------------------------------------------------------------------------------


class Slow(httpx2.AsyncByteStream):
    """An upstream's stream that waits for ``go`` between its pieces."""

    def __init__(self, pieces: list[bytes | Exception]) -> None:
        self.pieces, self.go, self.closed = pieces, asyncio.Event(), False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for i, piece in enumerate(self.pieces):
            if i:
                await self.go.wait()
            if isinstance(piece, Exception):
                raise piece
            yield piece

    async def aclose(self) -> None:
        self.closed = True


def streaming(stream: Slow) -> Upstream:
    headers = {"content-type": "text/event-stream"}
    return Upstream(handler=lambda request: httpx2.Response(200, stream=stream, headers=headers))


def test_streams_pass_piece_by_piece() -> None:
    async def work() -> None:
        stream = Slow([b"data: 1\n", b"\ndata: " + b"x" * 200_000])
        app = create_app(settings(), purifier=Invert(), transport=streaming(stream).transport)
        async with app.router.lifespan_context(app):
            driver = Driver(app, json.dumps(chat(A, stream=True)).encode())
            task = asyncio.create_task(driver.run())
            await driver.until(2)
            assert driver.text == b"data: 1\n", "the first piece is out before the second is made"
            stream.go.set()
            await task
        assert driver.text == b"data: 1\n\ndata: " + b"x" * 200_000
        assert driver.sent[-1] == {"type": "http.response.body", "body": b""}
        assert stream.closed

    run(work())


@pytest.mark.parametrize("begun", [True, False])
def test_hanging_up_cancels_the_upstream(begun: bool) -> None:
    async def work() -> None:
        stream, cancelled, reached = Slow([b"data: 1\n\n", b"never"]), asyncio.Event(), asyncio.Event()

        async def handler(request: httpx2.Request) -> httpx2.Response:
            reached.set()
            if begun:
                return httpx2.Response(200, stream=stream)
            try:
                await asyncio.sleep(60)
            finally:
                cancelled.set()
            raise AssertionError

        app = create_app(settings(), purifier=Invert(), transport=Upstream(handler=handler).transport)
        async with app.router.lifespan_context(app):
            driver = Driver(app, json.dumps(chat()).encode())
            task = asyncio.create_task(driver.run())
            await (driver.until(2) if begun else reached.wait())
            driver.gone.set()
            await asyncio.wait_for(task, 5)
        assert stream.closed if begun else cancelled.is_set()
        assert b"never" not in driver.text
        assert "codefend_disconnects_total 1.0" in app.state.meters.text().decode()

    run(work())


def test_an_upstream_that_dies_halfway_is_not_made_to_look_whole() -> None:
    async def work() -> None:
        stream = Slow([b"data: 1\n\n", httpx2.ReadError("gone")])
        stream.go.set()
        app = create_app(settings(), purifier=Invert(), transport=streaming(stream).transport)
        async with app.router.lifespan_context(app):
            driver = Driver(app, json.dumps(chat()).encode())
            await driver.run()
        assert driver.sent[-1]["more_body"] is True, "no last piece: the server closes the connection"
        event = driver.text.rpartition(b"data: ")[2]
        assert json.loads(event)["error"]["code"] == "upstream_broken"

    run(work())


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (httpx2.ConnectError("refused"), 502, "upstream_unreachable"),
        (httpx2.ConnectTimeout("slow"), 504, "upstream_connect_timeout"),
        (httpx2.ReadTimeout("slow"), 504, "upstream_timeout"),
        (httpx2.RemoteProtocolError("?"), 502, "upstream_unreachable"),
        (OSError("?"), 502, "upstream_unreachable"),
        (ValueError("secret detail"), 500, "internal_error"),
    ],
)
def test_a_dead_upstream_is_a_clear_error_in_the_apis_own_form(error: Exception, status: int, code: str) -> None:
    def handler(request: httpx2.Request) -> httpx2.Response:
        raise error

    async def work() -> None:
        async with gateway(Upstream(handler=handler)) as client:
            chat_answer = await client.post(CHAT, json=chat())
            claude = await client.post("/v1/messages", json={"messages": []})
        assert chat_answer.status_code == claude.status_code == status
        assert chat_answer.json()["error"]["code"] == code
        assert claude.json()["type"] == "error"
        assert claude.json()["error"]["message"].startswith(code)
        assert "secret detail" not in chat_answer.text

    run(work())


def test_a_whole_exchange_is_bounded() -> None:
    async def work() -> None:
        stream = Slow([b"data: 1\n\n", b"never"])
        app = create_app(settings(total_timeout_s=0.2), purifier=Invert(), transport=streaming(stream).transport)
        async with app.router.lifespan_context(app):
            driver = Driver(app, json.dumps(chat()).encode())
            await asyncio.wait_for(driver.run(), 5)
        assert stream.closed

    run(work())


# --- refusals --------------------------------------------------------------------------------------------------------


def bomb() -> bytes:
    """A PNG header that claims 40,000 x 40,000 pixels."""
    import struct
    import zlib

    head = b"IHDR" + struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


REFUSALS: list[tuple[Any, dict[str, Any], int, str]] = [
    (chat(A, B, A), {"max_images": 2}, 413, "too_many_images"),
    (chat(A), {"max_image_bytes": 100}, 413, "image_too_large"),
    (chat(bomb()), {}, 413, "image_too_large"),
    (chat(png(height=2, width=400)), {}, 400, "invalid_image"),
    (chat(b"GIF89a"), {}, 400, "invalid_image"),
    (chat(b"%PDF-1.7"), {}, 400, "invalid_image"),
    (chat(A[:60]), {}, 400, "invalid_image"),
    (chat(b""), {}, 400, "invalid_image"),
    (chat(A), {"max_body_bytes": 200}, 413, "body_too_large"),
    ({"messages": [{"content": [{"type": "image_url", "image_url": "https://example.org/a.png"}]}]}, {}, 400, "remote"),
    ({"messages": [{"content": [{"type": "image_url", "image_url": "file:///etc/passwd"}]}]}, {}, 400, "remote"),
    ({"messages": [{"content": [{"type": "image_url", "image_url": "AAAA"}]}]}, {}, 400, "remote"),
    ({"messages": [{"content": [{"type": "image_url", "image_url": "data:image/png,xyz"}]}]}, {}, 400, "invalid_image"),
    ({"messages": [{"content": [{"type": "image_url", "image_url": "data:image/png;base64,*"}]}]}, {}, 400, "invalid"),
    ({"messages": [{"content": [{"type": "video_url", "video_url": "x"}]}]}, {}, 400, "unknown_content"),
]


@pytest.mark.parametrize(("body", "flags", "status", "code"), REFUSALS)
def test_refusals_are_clear_and_reach_nobody(body: Any, flags: dict[str, Any], status: int, code: str) -> None:
    async def work() -> None:
        upstream = Upstream()
        async with gateway(upstream, **flags) as client:
            answer = await client.post(CHAT, json=body)
            metrics = (await client.get("/metrics")).text
        error = answer.json()["error"]
        assert (answer.status_code, error["code"].startswith(code)) == (status, True), answer.text
        assert 10 < len(error["message"]) < 250
        assert "iVBOR" not in answer.text
        assert answer.headers["x-codefend-status"] == "refused"
        assert not upstream.requests
        assert f'codefend_refused_total{{code="{error["code"]}"}} 1.0' in metrics

    run(work())


@pytest.mark.parametrize(
    ("path", "headers", "content", "status"),
    [
        (CHAT, {"content-type": "text/plain"}, b"{}", 415),
        (CHAT, {"content-type": "application/json; charset=utf-16"}, b"{}", 415),
        (CHAT, {"content-type": "application/json", "content-encoding": "gzip"}, b"{}", 415),
        (CHAT, {"content-type": "application/json"}, b'{"messages":[],"messages":[]}', 400),
        ("/v1/files", {"content-type": "multipart/form-data; boundary=x"}, A, 403),
        ("/v1/batches", {"content-type": "application/json"}, b'{"input_file_id": "f"}', 403),
        ("/v1/images/edits", {"content-type": "multipart/form-data; boundary=x"}, A, 415),
        ("/v1/tokenize", {"content-type": "application/json"}, json.dumps(chat(A)).encode(), 400),
        (CHAT + "/", {"content-type": "application/json"}, json.dumps(chat(A)).encode(), 400),
        ("/v1/x/%2e%2e/%2e%2e/pause", {}, b"", 400),
        ("/v1/x//y", {}, b"", 400),
        ("/v1/x/%0a/y", {}, b"", 400),
    ],
)
def test_what_cannot_be_looked_into_is_not_passed_on(
    path: str, headers: dict[str, str], content: bytes, status: int
) -> None:
    async def work() -> None:
        upstream = Upstream()
        async with gateway(upstream) as client:
            answer = await client.post(path, content=content, headers=headers)
        assert answer.status_code == status or (status == 400 and answer.status_code == 404), answer.text
        assert answer.json()["error"]["code"]
        assert not upstream.requests

    run(work())


def test_uploads_pass_where_the_operator_allows_them() -> None:
    async def work() -> None:
        upstream = Upstream()
        async with gateway(upstream, allow_uploads=True) as client:
            kind = {"content-type": "multipart/form-data; boundary=x"}
            answer = await client.post("/v1/files", content=b"--x--", headers=kind)
            chat_answer = await client.post(CHAT, content=b"--x--", headers=kind)
        assert (answer.status_code, chat_answer.status_code) == (200, 415)

    run(work())


def test_unknown_routes_are_json_errors() -> None:
    async def work() -> None:
        async with gateway(Upstream()) as client:
            answer = await client.get("/admin")
            wrong = await client.get("/page/purify")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
        assert (wrong.status_code, wrong.json()["error"]["code"]) == (405, "method_not_allowed")

    run(work())


# --- when the purifier fails -----------------------------------------------------------------------------------------


class Failing(Invert):
    """Works when warmed up, then does what it is told."""

    def __init__(self, fault: Any) -> None:
        super().__init__()
        self.fault = fault

    def __call__(self, images: torch.Tensor, *, generator: Any = None) -> torch.Tensor:
        if images.shape[-1] == 64:
            return images
        if isinstance(self.fault, BaseException):
            raise self.fault
        return self.fault(images)


def slow(images: torch.Tensor) -> torch.Tensor:
    import time

    time.sleep(0.4)
    return images


FAULTS: list[Any] = [
    RuntimeError("broken"),
    ValueError("shape"),
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory"),
    KeyError("x"),
    OSError(5, "device"),
    AssertionError(),
    StopIteration(),
    SystemExit(3),
    KeyboardInterrupt(),
    asyncio.CancelledError(),
    lambda images: images * torch.nan,
    lambda images: images[..., :-1],
    lambda images: None,
    slow,
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: type(f).__name__)
@pytest.mark.parametrize("on_error", ["block", "fallback", "pass"])
def test_no_failure_of_the_purifier_opens_the_gate(fault: Any, on_error: str) -> None:
    async def work() -> None:
        upstream = Upstream()
        flags = {"on_error": on_error, "purify_timeout_s": 0.1, "fallback": "blur"}
        async with gateway(upstream, purifier=Failing(fault), **flags) as client:
            answer = await client.post(CHAT, json=chat(A, B))
            metrics = (await client.get("/metrics")).text
        assert not upstream.saw(A, B), "not even a bypass sends the original bytes"
        if on_error == "block":
            assert answer.status_code in (500, 503)
            assert answer.json()["error"]["code"] in ("purification_failed", "purification_timeout")
            assert not upstream.requests
            assert "codefend_bypass_total{" not in metrics
            return
        assert answer.status_code == 200
        assert answer.headers["x-codefend-status"] == "bypassed"
        assert answer.headers["x-codefend-bypass"].count(",") == 1
        assert sum(float(line.split()[1]) for line in metrics.splitlines() if line.startswith("codefend_bypass_t")) == 2
        same = torch.equal(torch.stack(upstream.pictures()), torch.stack([picture(1), picture(2)]))
        assert same == (on_error == "pass")

    run(work())


def test_a_purifier_that_cannot_even_warm_up_stops_the_start() -> None:
    class Broken(Invert):
        def __call__(self, images: torch.Tensor, *, generator: Any = None) -> torch.Tensor:
            raise RuntimeError

    async def work() -> None:
        async with gateway(Upstream(), purifier=Broken()):
            pass

    with pytest.raises(Exception, match="RuntimeError in purifier invert"):
        run(work())


# --- policies --------------------------------------------------------------------------------------------------------


def test_detect_replaces_only_what_scores_high() -> None:
    bright, dark = png(3, shade=0.8), png(4, shade=0.2)

    async def work() -> None:
        upstream = Upstream()
        async with gateway(upstream, policy="detect", threshold=0.5) as client:
            answer = await client.post(CHAT, json=chat(bright, dark))
        first, second = upstream.pictures()
        torch.testing.assert_close(first, 1 - images.load(bright).pixels)
        torch.testing.assert_close(second, images.load(dark).pixels)
        assert answer.headers["x-codefend-score"].startswith("0.7")

    run(work())


def test_block_refuses_what_scores_high() -> None:
    async def work() -> None:
        upstream = Upstream()
        async with gateway(upstream, policy="block", threshold=0.5) as client:
            answer = await client.post(CHAT, json=chat(png(4, shade=0.2), png(3, shade=0.8)))
            calm = await client.post(CHAT, json=chat(png(4, shade=0.2)))
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "image_blocked")
        assert answer.json()["error"]["param"] == "messages[0].content[2].image_url.url"
        assert calm.status_code == 200
        assert len(upstream.requests) == 1

    run(work())


def test_a_request_may_choose_only_where_the_operator_allows_it() -> None:
    async def work() -> None:
        upstream = Upstream()
        wish = {"x-codefend-policy": "block", "x-codefend-threshold": "0.1"}
        async with gateway(upstream) as client:
            refused = await client.post(CHAT, json=chat(A), headers=wish)
        async with gateway(upstream, allow_override=True) as client:
            blocked = await client.post(CHAT, json=chat(A), headers=wish)
            wrong = await client.post(CHAT, json=chat(A), headers={"x-codefend-policy": "off"})
            bare = await client.post(CHAT, json=chat(A), headers={"x-codefend-policy": "block"})
            good = await client.post(CHAT, json=chat(A), headers=wish | {"x-codefend-threshold": "2"})
        codes = [answer.json()["error"]["code"] for answer in (refused, blocked, wrong, bare)]
        assert codes == ["override_refused", "image_blocked", "invalid_header", "invalid_header"]
        assert good.status_code == 200
        assert not any(name.startswith("x-codefend") for name in upstream.requests[0].headers)

    run(work())


def test_policies_need_a_score() -> None:
    with pytest.raises(UserError, match="no score"):
        create_app(settings(policy="block", threshold=1), purifier=lambda images, generator=None: images)


def test_prompt_policy_reaches_the_upstream() -> None:
    async def work() -> None:
        upstream = Upstream()
        async with gateway(upstream, prompt="look-closely") as client:
            await client.post(CHAT, json=chat(A, text="what?"))
            with_image = upstream.body["messages"][0]["content"][0]["text"]
            await client.post(CHAT, json=chat(text="what?"))
            without = upstream.body["messages"][0]["content"][0]["text"]
        assert with_image.startswith("what?\nAnswer only")
        assert without == "what?"

    run(work())


# --- load ------------------------------------------------------------------------------------------------------------


class Gate(Invert):
    """Randomized, counts its calls, and holds every picture until it is opened."""

    def __init__(self) -> None:
        import threading

        super().__init__()
        self.open = threading.Event()

    def __call__(self, images: torch.Tensor, *, generator: Any = None) -> torch.Tensor:
        if images.shape[-1] != 64:
            assert self.open.wait(10)
            self.batches.append(len(images))
        return torch.rand(images.shape, generator=generator)


def test_the_same_picture_is_purified_once() -> None:
    async def work() -> None:
        upstream, purifier = Upstream(), Gate()
        async with gateway(upstream, purifier=purifier) as client:
            pending = [asyncio.create_task(client.post(CHAT, json=chat(A))) for _ in range(3)]
            await asyncio.sleep(0.1)
            purifier.open.set()
            await asyncio.gather(*pending)
            again = await client.post(CHAT, json=chat(A))
        assert purifier.batches == [1]
        assert again.headers["x-codefend-cache"] == "hit"
        sent = {request.content for request in upstream.requests}
        assert len(sent) == 1, "a randomized purifier must not give a second chance"

    run(work())


def test_a_full_queue_says_when_to_come_back() -> None:
    async def work() -> None:
        upstream, purifier = Upstream(), Gate()
        async with gateway(upstream, purifier=purifier, queue_images=2, threads=1, batch_images=1) as client:
            pending = []
            for i in range(3):  # one into the purifier, two into the queue
                pending.append(asyncio.create_task(client.post(CHAT, json=chat(png(i)))))
                await asyncio.sleep(0.1)
            ready = await client.get("/readyz")
            answer = await client.post(CHAT, json=chat(png(9)))
            text_only = await client.post(CHAT, json=chat())
            purifier.open.set()
            done = await asyncio.gather(*pending)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "queue_full")
        assert int(answer.headers["retry-after"]) >= 1
        assert (ready.status_code, text_only.status_code) == (503, 200)
        assert [response.status_code for response in done] == [200] * 3

    run(work())


def test_one_key_cannot_keep_everything_busy() -> None:
    async def work() -> None:
        upstream, purifier = Upstream(), Gate()
        flags = {"api_keys": "first-key,second-key", "max_in_flight_per_key": 1}
        async with gateway(upstream, purifier=purifier, **flags) as client:
            first = {"authorization": "Bearer first-key"}
            pending = asyncio.create_task(client.post(CHAT, json=chat(A), headers=first))
            await asyncio.sleep(0.1)
            refused = await client.post(CHAT, json=chat(B), headers=first)
            other = asyncio.create_task(client.post(CHAT, json=chat(B), headers={"x-api-key": "second-key"}))
            await asyncio.sleep(0.1)
            purifier.open.set()
            assert (await pending).status_code == (await other).status_code == 200
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")

    run(work())


# --- keys, logs, operations ------------------------------------------------------------------------------------------


def test_keys_guard_all_but_health_and_the_static_page() -> None:
    async def work() -> None:
        upstream = Upstream()
        async with gateway(upstream, api_keys="sesame-open", upstream_api_key="upstream-secret") as client:
            for path in ("/healthz", "/readyz", "/"):
                assert (await client.get(path)).status_code == 200
            for path in ("/metrics", "/v1/models", "/page/info", "/docs"):
                assert (await client.get(path)).status_code == 401
            wrong = await client.post("/v1/messages", json={}, headers={"x-api-key": "sesame-opem"})
            assert wrong.json()["error"]["type"] == "authentication_error"
            for headers in (
                {"authorization": "Bearer sesame-open"},
                {"x-api-key": "sesame-open"},
                {"x-codefend-key": "sesame-open", "authorization": "Bearer of-the-client"},
            ):
                assert (await client.get("/v1/models", headers=headers)).status_code == 200
        for request in upstream.requests:
            assert "sesame-open" not in str(request.headers.raw)
            assert request.headers["authorization"] == "Bearer upstream-secret"
            assert request.headers["x-api-key"] == "upstream-secret"

    run(work())


def test_the_clients_own_upstream_key_passes_beside_the_gateways() -> None:
    async def work() -> None:
        upstream = Upstream()
        async with gateway(upstream, api_keys="sesame-open") as client:
            await client.get("/v1/models", headers={"x-codefend-key": "sesame-open", "authorization": "Bearer theirs"})
            await client.get("/v1/models", headers={"authorization": "Bearer sesame-open"})
        assert upstream.requests[0].headers["authorization"] == "Bearer theirs"
        assert "authorization" not in upstream.requests[1].headers

    run(work())


def test_logs_hold_no_keys_and_no_pixels(caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        async with gateway(Upstream(), api_keys="sesame-open", on_error="pass") as client:
            headers = {"authorization": "Bearer sesame-open", "x-request-id": "bad id\x7f", "cookie": "c=secret"}
            await client.post(f"{CHAT}?key=secret", json=chat(A), headers=headers)
            await client.post(CHAT, json=chat(A[:60], text="secret"), headers=headers)

    from codefend.gateway.telemetry import JsonFormatter

    with caplog.at_level(logging.DEBUG, logger="codefend"):
        run(work())
    lines = [json.loads(JsonFormatter().format(r)) for r in caplog.records if r.name == "codefend.gateway"]
    assert [line["status"] for line in lines] == [200, 400]
    assert lines[0]["images"] == 1
    assert lines[1]["code"] == "invalid_image"
    assert all(len(line["request_id"]) == 16 for line in lines)
    text = json.dumps(lines)
    assert "sesame" not in text
    assert "secret" not in text
    assert "iVBOR" not in text


def test_metrics_count_what_happened() -> None:
    async def work() -> None:
        async with gateway(Upstream()) as client:
            for _ in range(2):
                await client.post(CHAT, json=chat(A))
            await client.get("/v1/whatever")
            text = (await client.get("/metrics")).text
        for line in (
            'codefend_requests_total{route="/v1/chat/completions",status="200"} 2.0',
            'codefend_requests_total{route="/v1/*",status="200"} 1.0',
            'codefend_images_total{result="purified"} 1.0',
            'codefend_images_total{result="cached"} 1.0',
            "codefend_queue_images 0.0",
            "codefend_in_flight 0.0",
            "codefend_batch_images_sum 1.0",
        ):
            assert line in text, line

    run(work())


def test_not_ready_before_the_start_and_after_the_end() -> None:
    async def work() -> None:
        app = create_app(settings(), purifier=Invert(), transport=Upstream().transport)
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://g") as client:
            assert (await client.get("/readyz")).status_code == 503
            async with app.router.lifespan_context(app):
                assert (await client.get("/readyz")).status_code == 200
            assert (await client.get("/readyz")).status_code == 503
            assert (await client.get("/healthz")).status_code == 200
            late = await client.post(CHAT, json=chat(A))
            assert late.status_code in (500, 503)

    run(work())


def test_traces_carry_on_where_an_sdk_is_configured() -> None:
    sdk = pytest.importorskip("opentelemetry.sdk.trace")
    export = pytest.importorskip("opentelemetry.sdk.trace.export")
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter").InMemorySpanExporter()
    provider = sdk.TracerProvider()
    provider.add_span_processor(export.SimpleSpanProcessor(memory))

    async def work() -> None:
        upstream = Upstream()
        app = create_app(settings(), purifier=Invert(), transport=upstream.transport)
        proxy = next(route.app for route in app.routes if getattr(route, "path", "") == "/v1")
        given = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
        async with gateway(upstream, app=app) as client:
            await client.post(CHAT, json=chat(), headers={"traceparent": given})
            assert upstream.requests[-1].headers["traceparent"] == given, "without an SDK it passes as it came"
            proxy.tracer = Tracer(provider)
            await client.post(CHAT, json=chat(), headers={"traceparent": given})
        onward = upstream.requests[-1].headers["traceparent"]
        assert onward.split("-")[1] == given.split("-")[1]
        assert onward != given
        assert [span.name for span in memory.get_finished_spans()] == ["codefend.upstream"]

    run(work())


def test_the_gateway_does_not_load_victims() -> None:
    names = "app serve client middleware command"
    script = "import sys\n" + "".join(f"import codefend.gateway.{name}\n" for name in names.split())
    script += (
        "heavy = {'transformers', 'codefend.victims', 'codefend.attacks', 'codefend.tasks', 'codefend.training'}\n"
    )
    script += "print(sorted(heavy & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


# --- the page --------------------------------------------------------------------------------------------------------


def test_the_page_needs_no_outside_assets() -> None:
    async def work() -> None:
        async with gateway(Upstream()) as client:
            page = await client.get("/")
        assert page.headers["content-security-policy"].startswith("default-src 'none'")
        assert "http://" not in page.text
        assert "https://" not in page.text

    run(work())


def test_the_page_can_purify_and_where_allowed_compare() -> None:
    async def work() -> None:
        upstream = Upstream()
        async with gateway(upstream) as client:
            done = (await client.post("/page/purify", json={"image": url(A)})).json()
            bad = await client.post("/page/purify", json={"image": 3})
            closed = await client.post("/page/undefended", json=chat(A))
        torch.testing.assert_close(images.load(done["image"]).pixels, 1 - picture(1))
        assert done["score"] == pytest.approx(float(picture(1).mean()))
        assert (bad.status_code, closed.status_code) == (400, 403)
        assert not upstream.requests
        async with gateway(upstream, demo=True) as client:
            assert (await client.get("/page/info")).json()["demo"] is True
            answer = await client.post("/page/undefended", json=chat(A))
            metrics = (await client.get("/metrics")).text
        assert answer.json() == {"ok": True}
        torch.testing.assert_close(upstream.pictures()[0], picture(1))
        assert 'codefend_bypass_total{reason="demo"} 1.0' in metrics

    run(work())
