"""The gateway over its ASGI surface: nothing original passes, the rest passes untouched, streams stay streams."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest
import torch

from codefend.core import images
from codefend.gateway.app import create_app
from gateway_kit import CHAT, Driver, Invert, Upstream, b64, chat, gateway, image, png, run, settings, url

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
        async with gateway(upstream, scores="exact") as client:
            answer = await client.post(f"{path}?a=1", json=body, headers={"x-request-id": "r-1"})
        assert answer.json() == {"ok": True}
        assert answer.headers["x-upstream"] == "yes"
        assert not upstream.received(A, B)
        torch.testing.assert_close(torch.stack(upstream.images()), 1 - torch.stack([image(1), image(2)]))
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
        assert not upstream.received(A, B, png(7))
        data = upstream.body["system"][0]["source"]["data"]
        torch.testing.assert_close(images.load(f"data:image/png;base64,{data}").pixels, 1 - image(7))
        assert len(upstream.images()) == 3

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


# --- streaming --------------------------------------------------------------------------------------------------------


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
