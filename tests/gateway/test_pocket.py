"""The embedded model behind the gateway, with the official clients, plain and streamed."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anthropic
import httpx2
import openai
import pytest
from starlette.applications import Starlette
from torch import Tensor

from codefend.cli.showcase import BenchShowcase
from codefend.core import images
from codefend.gateway.app import create_app
from codefend.gateway.config import model_name
from codefend.gateway.pocket import pocket_transport
from gateway_kit import Driver, Invert, b64, chat, gateway, image, png, run, served, settings, url, wait_for


class Painter:
    """A victim that answers with the brightness of its image, and records its prompts."""

    name = "painter"

    def __init__(self) -> None:
        self.prompts: list[str] = []

    def generate(self, images: Tensor, prompts: Sequence[str]) -> list[str]:
        self.prompts += prompts
        return [f"brightness {float(image.mean()):.2f} it seems" for image in images]


BRIGHT = png(1, shade=0.8)  # inverted: 0.20
EXPECTED = f"brightness {float(1 - image(1, shade=0.8).mean()):.2f} it seems"


def pocket_app(victim: Any, **flags: Any) -> Starlette:
    transport = pocket_transport(victim, showcase=BenchShowcase())
    return create_app(
        settings(upstream="pocket", **flags), purifier=Invert(), transport=transport, showcase=BenchShowcase()
    )


@asynccontextmanager
async def clients(victim: Any, **flags: Any) -> AsyncIterator[tuple[Any, Any]]:
    app = pocket_app(victim, **flags)
    async with app.router.lifespan_context(app):
        http = httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app))
        base = "http://gateway.test"
        ours = openai.AsyncOpenAI(api_key="k", base_url=f"{base}/v1", http_client=http, max_retries=0)
        theirs = anthropic.AsyncAnthropic(api_key="k", base_url=base, http_client=http, max_retries=0)
        yield ours, theirs
        await http.aclose()


MESSAGES: Any = chat(BRIGHT, text="What is this?")["messages"]
ITEMS: Any = [
    {
        "role": "user",
        "content": [
            {"type": "input_text", "text": "What is this?"},
            {"type": "input_image", "image_url": url(BRIGHT), "detail": "auto"},
        ],
    }
]
BLOCKS: Any = [
    {
        "role": "user",
        "content": [
            {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": b64(BRIGHT)}},
            {"type": "text", "text": "What is this?"},
        ],
    }
]


def test_openai_chat() -> None:
    async def work() -> None:
        victim = Painter()
        async with clients(victim) as (client, _):
            whole = await client.chat.completions.create(model="pocket", messages=MESSAGES)
            assert whole.choices[0].message.content == EXPECTED
            assert whole.choices[0].finish_reason == "stop"
            assert whole.usage.completion_tokens == 4
            stream = await client.chat.completions.create(
                model="pocket", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
            )
            chunks = [chunk async for chunk in stream]
            assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == EXPECTED
            assert chunks[-1].usage.total_tokens > 4
            raw = await client.chat.completions.with_raw_response.create(model="pocket", messages=MESSAGES)
            assert raw.headers["x-codefend-cache"] == "hit"
            assert [model.id async for model in client.models.list()] == ["pocket"]
        assert set(victim.prompts) == {"What is this?"}

    run(work())


def test_the_model_goes_by_its_own_name(tmp_path: Path) -> None:
    assert model_name("hf:HuggingFaceTB/SmolVLM-256M-Instruct") == "HuggingFaceTB/SmolVLM-256M-Instruct"
    assert model_name(f"hf:{tmp_path}") == tmp_path.name, "no folder of this machine"

    async def work() -> tuple[Any, ...]:
        given = settings(upstream="smolvlm-pocket")
        transport = pocket_transport(Painter(), name=given.upstream, showcase=BenchShowcase())
        app = create_app(given, purifier=Invert(), transport=transport, showcase=BenchShowcase())
        async with gateway(None, app=app) as client:  # type: ignore[arg-type]
            info = (await client.get("/page/info")).json()
            models = (await client.get("/v1/models")).json()["data"]
            answer = (await client.post("/v1/chat/completions", json=chat(BRIGHT))).json()
        return (
            info["model"],
            info["attack"],
            models[0]["id"],
            answer["model"],
            answer["choices"][0]["message"]["content"],
        )

    name = "smolvlm-pocket"
    assert run(work()) == (name, True, name, name, EXPECTED)


def test_openai_responses() -> None:
    async def work() -> None:
        victim = Painter()
        async with clients(victim) as (client, _):
            whole = await client.responses.create(model="pocket", input=ITEMS, instructions="Be brief.")
            assert whole.output_text == EXPECTED
            stream = await client.responses.create(model="pocket", input=ITEMS, stream=True)
            events = [event async for event in stream]
            assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == EXPECTED
            assert events[-1].response.output_text == EXPECTED
            assert [event.sequence_number for event in events] == list(range(len(events)))
        assert victim.prompts == ["Be brief.\n\nWhat is this?", "What is this?"]

    run(work())


def test_anthropic_messages() -> None:
    async def work() -> None:
        victim = Painter()
        async with clients(victim) as (_, client):
            whole = await client.messages.create(model="pocket", max_tokens=9, messages=BLOCKS, system="Be brief.")
            assert whole.content[0].text == EXPECTED
            async with client.messages.stream(model="pocket", max_tokens=9, messages=BLOCKS) as stream:
                assert "".join([text async for text in stream.text_stream]) == EXPECTED
                final = await stream.get_final_message()
            assert (final.stop_reason, final.usage.output_tokens) == ("end_turn", 4)
        assert victim.prompts == ["Be brief.\n\nWhat is this?", "What is this?"]

    run(work())


def test_refusals_are_the_clients_own_exceptions() -> None:
    async def work() -> None:
        async with clients(Painter(), api_keys="not-their-key") as (ours, theirs):
            with pytest.raises(openai.AuthenticationError):
                await ours.models.list()
            with pytest.raises(anthropic.AuthenticationError):
                await theirs.messages.create(model="m", max_tokens=1, messages=BLOCKS)
        async with clients(Painter(), max_images=0) as (ours, theirs):
            with pytest.raises(openai.APIStatusError, match="1 images; the limit is 0"):
                await ours.chat.completions.create(model="m", messages=MESSAGES)
            with pytest.raises(anthropic.APIStatusError, match="too_many_images"):
                await theirs.messages.create(model="m", max_tokens=1, messages=BLOCKS)
        async with clients(Painter()) as (ours, _):
            with pytest.raises(openai.BadRequestError, match="send one"):
                await ours.chat.completions.create(model="m", messages=[{"role": "user", "content": "hi"}])

    run(work())


def test_a_second_image_is_refused_by_every_embedded_model_instead_of_being_ignored() -> None:
    async def work() -> None:
        for name in ("pocket", "hf:any/model"):
            app = create_app(
                settings(upstream=name), purifier=Invert(), transport=pocket_transport(Painter(), name=name)
            )
            async with gateway(None, app=app) as client:  # type: ignore[arg-type]
                body = chat(BRIGHT, png(2))
                earlier = chat(BRIGHT)["messages"] + [{"role": "assistant", "content": "x"}] + chat(png(2))["messages"]
                for refused in (body, body | {"messages": earlier}):
                    reply = await client.post("/v1/chat/completions", json=refused)
                    error = reply.json()["error"]
                    assert (reply.status_code, error["code"]) == (400, "too_many_images")
                    assert "about one image; this conversation holds 2" in error["message"]

    run(work())


def test_what_else_the_official_clients_ask_for() -> None:
    async def work() -> None:
        async with clients(Painter()) as (ours, theirs):
            assert (await ours.models.retrieve("pocket")).id == "pocket"
            assert (await theirs.messages.count_tokens(model="m", messages=BLOCKS)).input_tokens == 3
            assert (await ours.responses.input_tokens.count(model="m", input=ITEMS)).input_tokens == 3
            with pytest.raises(openai.NotFoundError, match="the model pocket has no POST /v1/embeddings") as caught:
                await ours.embeddings.create(model="m", input="x")
            assert caught.value.code == "not_found"

    run(work())


def test_samples_and_attacks_are_the_pages_and_need_the_embedded_model() -> None:
    async def work() -> None:
        ask = {"image": url(BRIGHT), "question": "What?"}
        async with gateway(None, app=pocket_app(Painter())) as client:  # type: ignore[arg-type]
            info = (await client.get("/page/info")).json()
            sample = (await client.post("/page/sample", json={"number": 3})).json()
            black_box = await client.post("/page/attack", json=ask)
            around = await client.post("/v1/demo/attack", json=ask)
            wrong = await client.post("/page/attack", json={"image": url(BRIGHT)})
        assert info["attack"] is True
        assert images.load(sample["image"]).pixels.shape == (3, 128, 128)
        assert sample["question"].endswith("?")
        assert sample["answer"]
        assert "black box" in black_box.json()["error"]["message"]
        assert (around.status_code, wrong.status_code) == (404, 400)
        for app in (pocket_app(Painter(), demo=False), create_app(settings(demo=True), purifier=Invert())):
            async with gateway(None, app=app) as client:  # type: ignore[arg-type]
                assert (await client.get("/page/info")).json()["attack"] is False
                for path in ("sample", "attack"):
                    assert (await client.post(f"/page/{path}", json=ask)).json()["error"]["code"] == "demo_off"

    run(work())


def test_nobody_waits_for_an_abandoned_attack() -> None:
    steps: list[float] = []
    released = threading.Event()

    class Endless(BenchShowcase):
        def attack(self, victim: Any, image: Tensor, question: str, check: Any = lambda: None) -> dict[str, Any]:
            try:
                for _ in range(3000):
                    check()
                    steps.append(time.monotonic())
                    time.sleep(0.01)
            finally:
                released.set()
            return {}

    async def work() -> None:
        transport = pocket_transport(Painter(), showcase=Endless())
        app = create_app(settings(upstream="pocket"), purifier=Invert(), transport=transport, showcase=Endless())
        async with app.router.lifespan_context(app):
            attack = Driver(app, json.dumps({"image": url(BRIGHT), "question": "What?"}).encode(), "/page/attack")
            attacking = asyncio.create_task(attack.run())
            while not steps:
                await asyncio.sleep(0.01)
            second = Driver(app, attack.body, "/page/attack")
            await second.run()
            assert second.sent[0]["status"] == 503, "one at a time"
            chatting = Driver(app, json.dumps(chat(BRIGHT)).encode())
            await asyncio.wait_for(chatting.run(), 5)
            assert chatting.sent[0]["status"] == 200, "chats do not wait for attacks"
            attack.gone.set()
            await asyncio.wait_for(attacking, 5)
            assert await asyncio.to_thread(released.wait, 5), "the attack ends with its request"

    run(work())


@pytest.mark.parametrize("options", [[1], "x", 1])
def test_malformed_options_are_a_clear_refusal(options: Any) -> None:
    async def work() -> None:
        async with gateway(None, app=pocket_app(Painter())) as client:  # type: ignore[arg-type]
            body = chat(BRIGHT, stream=True, stream_options=options)
            answer = await client.post("/v1/chat/completions", json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "stream_options")

    run(work())


def test_the_page_shows_both_answers() -> None:
    async def work() -> None:
        async with gateway(None, app=pocket_app(Painter())) as client:  # type: ignore[arg-type]
            assert (await client.get("/page/info")).json()["demo"] is True
            body = chat(BRIGHT) | {"model": "pocket"}
            bare = (await client.post("/page/undefended", json=body)).json()
            defended = (await client.post("/v1/chat/completions", json=body)).json()
        assert (
            bare["choices"][0]["message"]["content"] == f"brightness {float(image(1, shade=0.8).mean()):.2f} it seems"
        )
        assert defended["choices"][0]["message"]["content"] == EXPECTED

    run(work())


# --- over a real socket ----------------------------------------------------------------------------------------------


def test_the_blocking_clients_over_a_socket() -> None:
    with served(pocket_app(Painter())) as base:
        client = openai.OpenAI(api_key="k", base_url=f"{base}/v1", max_retries=0)
        with client:
            stream = client.chat.completions.create(model="pocket", messages=MESSAGES, stream=True)
            assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == EXPECTED
        with anthropic.Anthropic(api_key="k", base_url=base, max_retries=0) as claude:
            assert claude.messages.create(model="p", max_tokens=9, messages=BLOCKS).content[0].text == EXPECTED


def test_a_client_that_hangs_up_and_an_upstream_that_dies_over_sockets() -> None:
    closed = threading.Event()

    async def upstream(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return
        while (await receive()).get("more_body"):
            pass
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
        if scope["path"].endswith("messages"):
            return  # breaks off
        while (await receive())["type"] != "http.disconnect":
            pass
        closed.set()

    with served(upstream) as model:  # type: ignore[arg-type]
        app = create_app(settings(upstream=model), purifier=Invert())
        with served(app) as base, httpx2.Client(base_url=base) as client:
            with client.stream("POST", "/v1/chat/completions", json=chat(BRIGHT)) as answer:
                assert next(answer.iter_bytes()) == b"data: 1\n\n"
            assert closed.wait(5), "the upstream learns that the client is gone"
            with (
                pytest.raises(httpx2.RemoteProtocolError),
                client.stream("POST", "/v1/messages", json={"messages": []}) as answer,
            ):
                assert b"upstream_broken" in b"".join(answer.iter_bytes())
            wait_for(lambda: "codefend_in_flight 0.0" in client.get("/metrics").text)


def test_a_slow_reader_is_not_buffered_for() -> None:
    sent = 0

    async def upstream(scope: Any, receive: Any, send: Any) -> None:
        nonlocal sent
        if scope["type"] == "lifespan":
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(400):
            await send({"type": "http.response.body", "body": b"x" * 100_000, "more_body": True})
            sent += 1
        await send({"type": "http.response.body", "body": b""})

    with served(upstream) as model:  # type: ignore[arg-type]
        app = create_app(settings(upstream=model), purifier=Invert())
        with (
            served(app) as base,
            httpx2.Client(base_url=base) as client,
            client.stream("GET", "/v1/models/x") as answer,
        ):
            pieces = answer.iter_raw()
            size = len(next(pieces))
            time.sleep(0.5)
            assert sent < 300, "40 MB would be waiting in memory"
            size += sum(len(piece) for piece in pieces)
            assert size == 40_000_000


def test_serve_drains_and_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that runs when the signal comes is still answered."""
    import signal
    import socket

    from codefend.gateway import serve as module
    from codefend.types import CodefendError

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(CodefendError, match="cannot listen"):
            module.serve(lambda: settings(port=taken.getsockname()[1]))

    began = threading.Event()

    class Late(Painter):
        def generate(self, images: Tensor, prompts: Sequence[str]) -> list[str]:
            began.set()
            time.sleep(0.5)
            return super().generate(images, prompts)

    servers: list[Any] = []
    original = module._Server.__init__

    def remember(self: Any, *args: Any) -> None:
        original(self, *args)
        servers.append(self)

    monkeypatch.setattr(module._Server, "__init__", remember)
    monkeypatch.setattr(module, "create_app", lambda *_, **__: pocket_app(Late()))
    monkeypatch.setattr(module, "configure_logging", lambda level: None)
    results: list[int] = []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    thread = threading.Thread(
        target=lambda: results.append(module.serve(lambda: settings(upstream="pocket", port=port)))
    )
    thread.start()
    wait_for(lambda: servers and servers[0].started)
    answers: list[httpx2.Response] = []
    ask = threading.Thread(
        target=lambda: answers.append(httpx2.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=chat(BRIGHT)))
    )
    ask.start()
    assert began.wait(30)
    servers[0].handle_exit(signal.SIGTERM, None)
    ask.join(30)
    thread.join(30)
    assert answers[0].status_code == 200
    assert results == [0]


@pytest.mark.weights
def test_the_real_pocket_answers() -> None:
    from codefend.types import CodefendError

    try:
        transport = pocket_transport()
    except CodefendError as error:
        pytest.skip(str(error))

    async def work() -> None:
        app = create_app(settings(upstream="pocket"), purifier=Invert(), transport=transport)
        async with gateway(None, app=app) as client:  # type: ignore[arg-type]
            body = chat(png(1, height=224, width=224), text="What is in the image?")
            answer = await client.post("/v1/chat/completions", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["message"]["content"].strip()

    asyncio.run(work())
