"""Without a proxy: client wrapper, middleware, LiteLLM guardrail, vLLM connector, before a capturing upstream."""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
import types
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx2
import openai
import pytest
import torch
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from codefend.core import images
from codefend.gateway.client import wrap
from codefend.gateway.middleware import PurifyMiddleware
from codefend.types import CodefendError
from gateway_kit import Invert, Upstream, b64, chat, image, png, run, url

A = png(1)
ANSWER = {
    "id": "c",
    "object": "chat.completion",
    "created": 0,
    "model": "m",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}],
}
MESSAGE = {
    "id": "m",
    "type": "message",
    "role": "assistant",
    "model": "m",
    "content": [{"type": "text", "text": "hi"}],
    "stop_reason": "end_turn",
    "stop_sequence": None,
    "usage": {"input_tokens": 1, "output_tokens": 1},
}
BLOCK = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": b64(A)}}


def assert_purified(upstream: Upstream) -> None:
    assert upstream.requests
    assert not upstream.received(A)
    for received in upstream.images():
        torch.testing.assert_close(received, 1 - image(1))
    assert upstream.images()


# --- the client wrapper ----------------------------------------------------------------------------------------------


class Sync(httpx2.BaseTransport):
    """The capturing upstream for blocking clients."""

    def __init__(self, upstream: Upstream) -> None:
        self.upstream = upstream

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        request.read()
        self.upstream.requests.append(request)
        if self.upstream.handler is not None:
            answer = self.upstream.handler(request)
            assert isinstance(answer, httpx2.Response)
            return answer
        return httpx2.Response(200, json=self.upstream.reply)


def test_wrapped_openai() -> None:
    upstream = Upstream(reply=ANSWER)
    http = httpx2.Client(transport=Sync(upstream))
    client = openai.OpenAI(api_key="k", base_url="http://up.test/v1", http_client=http, max_retries=0)
    wrapped = wrap(client, Invert(), prompt="look-closely")
    assert isinstance(wrapped, openai.OpenAI)
    answer = wrapped.chat.completions.create(model="m", messages=chat(A, text="what?")["messages"])
    assert answer.choices[0].message.content == "hi"
    assert_purified(upstream)
    request = upstream.requests[0]
    assert request.headers["authorization"] == "Bearer k"
    assert str(request.url) == "http://up.test/v1/chat/completions"
    assert int(request.headers["content-length"]) == len(request.content)
    assert upstream.body["messages"][0]["content"][0]["text"].startswith("what?\nAnswer only")
    wrapped.with_options(timeout=3).chat.completions.create(model="m", messages=chat(A)["messages"])
    assert_purified(upstream)
    before = len(upstream.requests)
    for bad in ("https://example.org/a.png", "data:image/png;base64,AAAA"):
        part = {"type": "image_url", "image_url": {"url": bad}}
        with pytest.raises(openai.BadRequestError):
            wrapped.chat.completions.create(model="m", messages=[{"role": "user", "content": [part]}])
    with pytest.raises(openai.APIStatusError, match="uploads are not sent"):
        wrapped.files.create(file=A, purpose="vision")
    assert len(upstream.requests) == before


def test_wrapped_client_sends_texts_as_they_are_and_follows_redirects_purified() -> None:
    moved = [True]

    def handler(request: httpx2.Request) -> httpx2.Response:
        if moved.pop() if moved else False:
            return httpx2.Response(307, headers={"location": "http://up.test/v1/elsewhere/chat/completions"})
        return httpx2.Response(200, json=ANSWER)

    upstream = Upstream(handler=handler)
    http = httpx2.Client(transport=Sync(upstream), follow_redirects=True)
    client = wrap(openai.OpenAI(api_key="k", base_url="http://up.test/v1", http_client=http), Invert())
    client.chat.completions.create(model="m", messages=chat(A)["messages"])
    assert len(upstream.requests) == 2
    assert_purified(upstream)
    client.chat.completions.create(model="m", messages=[{"role": "user", "content": "é"}])
    assert upstream.body["messages"] == [{"role": "user", "content": "é"}]


def test_wrapped_async_openai_streams() -> None:
    chunk = {"id": "c", "object": "chat.completion.chunk", "created": 0, "model": "m"}
    delta = chunk | {"choices": [{"index": 0, "delta": {"content": "hi"}, "finish_reason": None}]}
    body = f"data: {json.dumps(delta)}\n\ndata: [DONE]\n\n".encode()

    def handler(request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, content=body, headers={"content-type": "text/event-stream"})

    async def work() -> None:
        upstream = Upstream(handler=handler)
        http = httpx2.AsyncClient(transport=upstream.transport)
        client = wrap(openai.AsyncOpenAI(api_key="k", base_url="http://up.test/v1", http_client=http), Invert())
        stream = await client.chat.completions.create(model="m", messages=chat(A)["messages"], stream=True)
        assert [c.choices[0].delta.content async for c in stream] == ["hi"]
        assert_purified(upstream)
        await client.close()
        assert http.is_closed

    run(work())


@pytest.mark.parametrize("copy", [{}, {"timeout": 3}, {"data_residency": "eu"}, {"websocket_base_url": "wss://x"}])
def test_wrapped_clients_open_no_websockets(copy: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    module = types.ModuleType("websockets.sync.client")
    module.connect = lambda url, **options: opened.append(url)  # type: ignore[attr-defined]
    for name in ("websockets", "websockets.sync"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "websockets.sync.client", module)
    client = wrap(openai.OpenAI(api_key="k", base_url="http://up.test/v1"), Invert()).with_options(**copy)
    for manager in (client.responses.connect(), client.realtime.connect(model="m")):
        with pytest.raises(TypeError, match="a wrapped client opens no WebSockets"):
            manager.enter()
    assert opened == []


def test_wrapped_anthropic() -> None:
    upstream = Upstream(reply=MESSAGE)
    http = httpx2.Client(transport=Sync(upstream))
    client = wrap(anthropic.Anthropic(api_key="k", base_url="http://up.test", http_client=http), Invert())
    answer = client.messages.create(model="m", max_tokens=5, messages=[{"role": "user", "content": [BLOCK]}])
    assert answer.content[0].text == "hi"
    assert_purified(upstream)
    assert upstream.requests[0].headers["authorization"] == "Bearer k"
    block = {"type": "image", "source": {"type": "url", "url": "https://example.org/a.png"}}
    with pytest.raises(anthropic.BadRequestError, match="remote image URLs"):
        client.messages.create(model="m", max_tokens=5, messages=[{"role": "user", "content": [block]}])


def test_a_failing_purifier_sends_nothing() -> None:
    class Broken(Invert):
        def forward(self, images: torch.Tensor, *, generator: Any = None) -> torch.Tensor:
            raise RuntimeError

    upstream = Upstream(reply=ANSWER)
    http = httpx2.Client(transport=Sync(upstream))
    client = wrap(openai.OpenAI(api_key="k", base_url="http://u/v1", http_client=http, max_retries=0), Broken())
    with pytest.raises(openai.InternalServerError, match="could not be purified"):
        client.chat.completions.create(model="m", messages=chat(A)["messages"])
    assert not upstream.requests


def test_only_the_official_clients_can_be_wrapped() -> None:
    with pytest.raises(CodefendError, match="cannot wrap dict"):
        wrap({}, Invert())
    with pytest.raises(CodefendError, match="unknown purifier"):
        wrap(openai.OpenAI(api_key="k"), "nothing-such")


# --- the middleware --------------------------------------------------------------------------------------------------


def test_middleware() -> None:
    upstream = Upstream()

    async def endpoint(request: Request) -> Response:
        body = await request.body()
        assert int(request.headers["content-length"]) == len(body)
        upstream.requests.append(httpx2.Request("POST", "http://x", content=body))
        return JSONResponse({"ok": True})

    async def work() -> None:
        paths = ("/v1/chat/completions", "/api/v1/messages", "/upload")
        inner = Starlette(routes=[Route(path, endpoint, methods=["POST"]) for path in paths])
        app = PurifyMiddleware(inner, Invert())
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://app.test") as client:
            answer = await client.post(paths[0], json=chat(A))
            assert answer.headers["x-codefend-images"] == "1"
            assert_purified(upstream)
            await client.post(paths[1], json={"messages": [{"role": "user", "content": [BLOCK]}]})
            assert_purified(upstream)
            before = len(upstream.requests)
            bad = await client.post(paths[1], json={"messages": [{"role": "user", "content": [{"type": "video"}]}]})
            assert (bad.status_code, bad.json()["type"]) == (400, "error")
            squeezed = await client.post(paths[0], content=b"x", headers={"content-encoding": "gzip"})
            assert squeezed.status_code == 415
            assert len(upstream.requests) == before
            own = await client.post(paths[2], content=A)
            assert own.status_code == 200
            assert upstream.requests[-1].content == A
        await lifespan(app)
        assert app.engine.lane is not None
        assert not any(thread.is_alive() for thread in app.engine.lane._threads)

    run(work())


async def lifespan(app: Any) -> None:
    messages = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        pass

    await app({"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}, receive, send)


# --- LiteLLM ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def guardrail(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The guardrail on the real LiteLLM where it is installed, else on a stand-in for its base class."""
    name = "codefend.integrations.litellm"
    try:
        importlib.import_module("litellm.integrations.custom_guardrail")
    except ModuleNotFoundError:
        base = types.ModuleType("litellm.integrations.custom_guardrail")
        base.CustomGuardrail = type("CustomGuardrail", (), {"__init__": lambda self, **kwargs: None})  # type: ignore[attr-defined]
        for module in ("litellm", "litellm.integrations"):
            monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
        monkeypatch.setitem(sys.modules, "litellm.integrations.custom_guardrail", base)
    monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module(name)
    sys.modules.pop(name, None)


def test_litellm_guardrail_replaces_the_images(guardrail: Any) -> None:
    async def work() -> None:
        rail = guardrail.CodefendGuardrail(Invert(), guardrail_name="codefend")
        assert not hasattr(type(rail), "apply_guardrail") or "apply_guardrail" not in type(rail).__dict__
        body = chat(A)
        data = {**body, "litellm_call_id": object(), "proxy_server_request": {"body": dict(body), "headers": {}}}
        done = await rail.async_pre_call_hook(None, None, data, "completion")
        assert done is data
        text = json.dumps({"sent": data["messages"], "logged": data["proxy_server_request"]["body"]})
        assert b64(A) not in text
        pixels = images.load(data["messages"][0]["content"][1]["image_url"]["url"]).pixels
        torch.testing.assert_close(pixels, 1 - image(1))

        data = {"messages": [{"role": "user", "content": [BLOCK]}]}
        await rail.async_pre_call_hook(None, None, data, "anthropic_messages")
        assert b64(A) not in json.dumps(data)
        item = {"role": "user", "content": [{"type": "input_image", "image_url": url(A)}]}
        data = {"input": [item]}
        await rail.async_pre_call_hook(None, None, data, "aresponses")
        assert b64(A) not in json.dumps(data)
        await rail.async_pre_call_hook(None, None, {"input": "plain"}, "embeddings")
        for bad in ({"messages": [{"content": [{"type": "video_url"}]}]}, {"input": [url(A)]}, {"image": A}):
            with pytest.raises(Exception, match=r"unknown|image"):
                await rail.async_pre_call_hook(None, None, bad, "x")
        await rail.engine.lane.close()

    run(work())


CHAT_BODY: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
SEEN = chat(A)["messages"]
PART = {"type": "image_url", "image_url": {"url": url(A)}}
ASIDE: list[tuple[str, dict[str, Any]]] = [
    ("acompletion", CHAT_BODY | {"fallbacks": [{"model": "n", "messages": SEEN}]}),
    ("acompletion", CHAT_BODY | {"extra_body": {"messages": SEEN}}),
    ("agenerate_content", {"contents": [{"parts": [{"inlineData": {"mimeType": "image/png", "data": b64(A)}}]}]}),
    ("agenerate_content", {"contents": [{"parts": [{"fileData": {"fileUri": "gs://bucket/a.png"}}]}]}),
    ("aocr", {"model": "m", "document": PART}),
    ("aocr", {"model": "m", "document": {"type": "document_url", "document_url": "https://example.org/a.pdf"}}),
    ("aresponses", {"input": "hi", "prompt": {"variables": {"x": {"type": "input_image", "image_url": url(A)}}}}),
    ("_arealtime", {"model": "m"}),
    ("_aresponses_websocket", {"model": "m"}),
]


@pytest.mark.parametrize(("call_type", "body"), ASIDE)
def test_litellm_guardrail_refuses_images_where_it_cannot_replace_them(
    guardrail: Any, call_type: str, body: dict[str, Any]
) -> None:
    async def work() -> None:
        rail = guardrail.CodefendGuardrail(Invert(), guardrail_name="codefend")
        with pytest.raises(Exception, match=r"may hold an image|cannot be inspected"):
            await rail.async_pre_call_hook(None, None, body, call_type)
        await rail.engine.lane.close()

    run(work())


def test_litellm_guardrail_leaves_what_is_litellms_own(guardrail: Any) -> None:
    async def work() -> None:
        rail = guardrail.CodefendGuardrail(Invert(), guardrail_name="codefend")
        data: dict[str, Any] = chat(A) | {"fallbacks": [{"model": "n"}], "api_key": "secret", "litellm_call_id": "1"}
        data["metadata"] = {"requester_metadata": {"image": url(A)}}
        data["proxy_server_request"] = {"body": {"messages": data["messages"]}}
        data["proxy_server_request"]["body"]["proxy_server_request"] = data["proxy_server_request"]  # as LiteLLM has it
        await rail.async_pre_call_hook(None, None, data, "acompletion")
        logged = data["proxy_server_request"]["body"]
        assert logged["messages"] is data["messages"]
        assert b64(A) not in json.dumps(data["messages"])
        assert "api_key" not in logged, "only what was purified"
        await rail.engine.lane.close()

    run(work())


# --- vLLM ------------------------------------------------------------------------------------------------------------


class Registry(dict):  # type: ignore[type-arg]
    def register(self, name: str) -> Any:
        return lambda kind: self.setdefault(name, kind)


@pytest.fixture
def vllm_media(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A stand-in with the methods of vLLM's connector; `test_gateway_vllm.py` takes the real one."""

    class MediaConnector:
        allowed_media_domains: tuple[str, ...] = ()

        def fetch_image(self, image_url: str, *args: Any, **kwargs: Any) -> Any:
            return ("loaded", image_url, args, kwargs)

        async def fetch_image_async(self, image_url: str, *args: Any, **kwargs: Any) -> Any:
            return self.fetch_image.__func__ and MediaConnector.fetch_image(self, image_url, *args, **kwargs)

        def fetch_audio(self, url: str) -> str:
            return url

        def fetch_video(self, url: str) -> str:
            return url

        def fetch_image_embedding(self, data: str) -> str:
            return data

        def fetch_video_embedding(self, data: str) -> str:
            return data

    media = types.ModuleType("vllm.multimodal.media")
    media.MediaConnector, media.MEDIA_CONNECTOR_REGISTRY = MediaConnector, Registry()  # type: ignore[attr-defined]
    for name in ("vllm", "vllm.multimodal"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "vllm.multimodal.media", media)
    return media


def test_vllm_connector(vllm_media: types.ModuleType) -> None:
    from codefend.integrations.vllm import register

    register(Invert())
    connector = vllm_media.MEDIA_CONNECTOR_REGISTRY["codefend"]()
    asynchronous = asyncio.run(connector.fetch_image_async(url(A), "io", image_mode="RGB"))
    for loaded, address, args, kwargs in (connector.fetch_image(url(A), "io", image_mode="RGB"), asynchronous):
        assert (loaded, args, kwargs) == ("loaded", ("io",), {"image_mode": "RGB"})
        torch.testing.assert_close(images.load(address).pixels, 1 - image(1))
    for bad in ("https://example.org/a.png", "file:///etc/passwd", "data:image/png;base64,AAAA", "data:,x"):
        with pytest.raises(ValueError, match=r".{10}"):
            connector.fetch_image(bad)
    assert connector.fetch_audio("a") == "a"
    for method in (connector.fetch_video, connector.fetch_image_embedding, connector.fetch_video_embedding):
        with pytest.raises(ValueError, match="cannot inspect"):
            method("x")
