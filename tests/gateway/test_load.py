"""Policies, and what happens when many want something at once."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from codefend import purifiers
from codefend.core import images
from codefend.gateway.app import create_app
from codefend.gateway.engine import Terms
from codefend.gateway.local import local_engine
from codefend.types import CodefendError
from gateway_kit import CHAT, Invert, Upstream, chat, gateway, png, run, settings, url

A, B = png(1), png(2)


def test_detect_replaces_only_what_scores_high() -> None:
    bright, dark = png(3, shade=0.8), png(4, shade=0.2)

    async def work() -> None:
        upstream = Upstream()
        async with gateway(upstream, policy="detect", threshold=0.5, scores="exact") as client:
            answer = await client.post(CHAT, json=chat(bright, dark))
        first, second = upstream.images()
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


class Calibrated(Invert):
    detector = SimpleNamespace(threshold=0.5)


def test_the_calibrated_threshold_is_the_default() -> None:
    bright, dark = png(3, shade=0.8), png(4, shade=0.2)

    async def statuses(**flags: Any) -> list[int]:
        async with gateway(Upstream(), purifier=Calibrated(), **flags) as client:
            wish = {"x-codefend-policy": "block"} if "allow_override" in flags else {}
            return [(await client.post(CHAT, json=chat(data), headers=wish)).status_code for data in (bright, dark)]

    assert run(statuses(policy="block")) == [400, 200]
    assert run(statuses(policy="block", threshold=0.9)) == [200, 200]
    assert run(statuses(allow_override=True)) == [400, 200]
    assert run(statuses(allow_override=True, threshold=0.1)) == [400, 400]


def test_the_shipped_threshold_reaches_the_engine_and_purifiers_without_one_need_it() -> None:
    shipped = purifiers.load("bridge").detector
    assert shipped is not None
    for app in (create_app(settings(purifier="bridge", policy="block", isolate=isolate)) for isolate in (True, False)):
        assert app.state.engine.terms == Terms("block", shipped.threshold)
    assert local_engine("bridge", policy="detect").terms == Terms("detect", shipped.threshold)
    assert local_engine("bridge", policy="detect", threshold=0.1).terms == Terms("detect", 0.1)
    for build in (
        lambda: create_app(settings(purifier="jpeg", policy="block")),
        lambda: local_engine("jpeg", policy="block"),
    ):
        with pytest.raises(CodefendError, match="policy block needs a threshold: purifier jpeg has no calibrated one"):
            build()


def test_a_fallbacks_score_is_not_measured_by_the_purifiers_threshold() -> None:
    class Broken(Calibrated):
        def forward(self, images: torch.Tensor, *, generator: Any = None) -> torch.Tensor:
            if self.batches:  # not the warm-up
                raise RuntimeError("broken")
            return super().forward(images)

    async def work() -> None:
        upstream = Upstream()
        flags: dict[str, Any] = {"on_error": "fallback", "fallback": "blur"}
        async with gateway(upstream, purifier=Broken(), policy="block", **flags) as client:
            answer = await client.post(CHAT, json=chat(png(4, shade=0.2)))
        assert answer.json()["error"]["code"] == "image_blocked", "nobody judged it"
        assert upstream.requests == []

    run(work())


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


# --- load -------------------------------------------------------------------------------------------------------------


class Gate(Invert):
    """Randomized, counts its calls, and holds every image until it is opened."""

    def __init__(self) -> None:
        import threading

        super().__init__()
        self.open = threading.Event()

    def forward(self, images: torch.Tensor, *, generator: Any = None) -> torch.Tensor:
        if images.shape[-1] != 64:
            assert self.open.wait(10)
            self.batches.append(len(images))
        return torch.rand(images.shape, generator=generator)


def test_the_same_image_is_purified_once() -> None:
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
        async with gateway(upstream, purifier=purifier, queue_images=2, workers=1, batch_images=1) as client:
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
            page = await client.post("/page/purify", json={"image": url(B)}, headers=first)
            other = asyncio.create_task(client.post(CHAT, json=chat(B), headers={"x-api-key": "second-key"}))
            await asyncio.sleep(0.1)
            purifier.open.set()
            assert (await pending).status_code == (await other).status_code == 200
        for answer in (refused, page):
            assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")

    run(work())
