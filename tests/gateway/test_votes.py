"""The gateway's answers by vote: several requests under other noise, one answer, and its cost in a header."""

from __future__ import annotations

import json

import httpx2
import pytest
import torch
from torch import Generator, Tensor

from codefend.core import images
from codefend.gateway.app import build_engine
from codefend.gateway.votes import text_of
from codefend.types import CodefendError
from gateway_kit import CHAT, Upstream, chat, gateway, png, run, settings
from purifiers_kit import PlainPurifier


class Noise(PlainPurifier):
    name, stochastic = "noise", True

    def forward(self, images: Tensor, *, generator: Generator | None = None) -> Tensor:
        return (images + 0.1 * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def answer(text: str, status: int = 200) -> httpx2.Response:
    return httpx2.Response(status, json={"choices": [{"message": {"content": text}}], "usage": {"total_tokens": 3}})


def sent(upstream: Upstream) -> list[Tensor]:
    bodies = [json.loads(request.content) for request in upstream.requests]
    return [images.load(body["messages"][0]["content"][1]["image_url"]["url"]).pixels for body in bodies]


def test_the_answer_that_most_are_like_is_returned_and_each_saw_other_noise() -> None:
    texts = iter(["red", "blue", "Blue.", "blue", "green"])
    upstream = Upstream(handler=lambda request: answer(next(texts)))

    async def work() -> httpx2.Response:
        async with gateway(upstream, purifier=Noise(), votes=5) as client:
            return await client.post(CHAT, json=chat(png()))

    response = run(work())
    assert response.json()["choices"][0]["message"]["content"].lower().startswith("blue")
    assert response.headers["x-codefend-votes"] == "5"
    assert response.json()["usage"] == {"total_tokens": 3}
    seen = sent(upstream)
    assert len(seen) == 5
    assert len({image.numpy().tobytes() for image in seen}) == 5


def test_the_noise_of_each_turn_is_the_same_for_the_same_image() -> None:
    upstream = Upstream(handler=lambda request: answer("red"))

    async def work() -> str:
        async with gateway(upstream, purifier=Noise(), votes=3, cache_mb=0) as client:
            for _ in range(2):
                await client.post(CHAT, json=chat(png()))
            return (await client.get("/metrics")).text

    metrics = run(work())
    draws = [image.numpy().tobytes() for image in sent(upstream)]
    assert len(draws) == 6
    assert 'codefend_images_total{result="purified"} 2.0' in metrics, "an image counts once, whatever its draws"
    assert set(draws[:3]) == set(draws[3:])


def test_an_error_of_the_upstream_is_passed_on_and_text_alone_is_asked_once() -> None:
    statuses = iter([200, 429, 200, 200])
    upstream = Upstream(handler=lambda request: answer("red", next(statuses)))

    async def work() -> tuple[httpx2.Response, httpx2.Response]:
        async with gateway(upstream, purifier=Noise(), votes=3) as client:
            failed = await client.post(CHAT, json=chat(png()))
            plain = await client.post(CHAT, json={"model": "m", "messages": [{"role": "user", "content": "hello"}]})
            return failed, plain

    failed, plain = run(work())
    assert failed.status_code == 429
    assert plain.status_code == 200
    assert "x-codefend-votes" not in plain.headers
    assert len(upstream.requests) == 4


def test_a_streamed_answer_is_refused_before_anything_is_sent() -> None:
    upstream = Upstream()

    async def work() -> httpx2.Response:
        async with gateway(upstream, purifier=Noise(), votes=3) as client:
            return await client.post(CHAT, json=chat(png(), stream=True))

    response = run(work())
    assert response.status_code == 400
    assert "without stream" in response.text
    assert upstream.requests == []


def test_votes_of_a_purifier_without_noise_are_refused_at_the_start() -> None:
    with pytest.raises(CodefendError, match="adds no noise"):
        build_engine(settings(votes=3, purifier="identity"))


@pytest.mark.parametrize(
    ("api", "body", "text"),
    [
        ("chat", {"choices": [{"message": {"content": "red"}}]}, "red"),
        ("chat", {"choices": [{"message": {"content": None, "tool_calls": []}}]}, ""),
        ("messages", {"content": [{"type": "text", "text": "red"}, {"type": "tool_use"}]}, "red"),
        ("responses", {"output": [{"type": "message", "content": [{"type": "output_text", "text": "red"}]}]}, "red"),
        ("chat", {"error": "x"}, ""),
        ("chat", [], ""),
    ],
)
def test_the_text_of_an_answer(api: str, body: object, text: str) -> None:
    assert text_of(api, json.dumps(body).encode()) == text  # type: ignore[arg-type]
    assert text_of(api, b"\xff") == ""  # type: ignore[arg-type]
