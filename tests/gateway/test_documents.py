"""PDF files in requests: refused, or replaced by their purified pages."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from typing import Any

import httpx2
import pytest

from codefend.gateway.app import create_app
from codefend.gateway.pool import Pool, PoolOptions
from codefend.gateway.worker import Job, Result, Worker
from gateway_kit import Invert, Upstream, b64, gateway, png, run, settings, url
from pdf_kit import LOCK, SCRIPT, pdf

PDF = pdf(0.25, 0.75)
TEXT = {"chat": "text", "responses": "input_text", "messages": "text"}
PATHS = {"chat": "/v1/chat/completions", "responses": "/v1/responses", "messages": "/v1/messages"}
every_api = pytest.mark.parametrize("api", PATHS)


def document(api: str, data: bytes = PDF) -> dict[str, Any]:
    file = {"filename": "report.pdf", "file_data": f"data:application/pdf;base64,{b64(data)}"}
    if api == "chat":
        return {"type": "file", "file": file, "prompt_cache_breakpoint": {"mode": "explicit"}}
    if api == "responses":
        return {"type": "input_file", **file, "prompt_cache_breakpoint": {"mode": "explicit"}}
    source = {"type": "base64", "media_type": "application/pdf", "data": b64(data)}
    return {"type": "document", "source": source, "title": "report.pdf", "cache_control": {"type": "ephemeral"}}


def request(api: str, *parts: Any, text: str = "what?") -> dict[str, Any]:
    key = "input" if api == "responses" else "messages"
    return {"model": "m", key: [{"role": "user", "content": [*parts, {"type": TEXT[api], "text": text}]}]}


async def post(client: httpx2.AsyncClient, api: str, *parts: Any) -> httpx2.Response:
    return await client.post(PATHS[api], json=request(api, *parts))


@every_api
def test_a_pdf_is_refused_by_default(api: str) -> None:
    async def work() -> None:
        upstream = Upstream()
        async with gateway(upstream) as client:
            answer = await post(client, api, document(api))
        assert answer.status_code == 400
        assert "cannot be inspected" in answer.text
        assert not upstream.requests

    run(work())


@every_api
def test_pages_are_purified_and_stand_in_the_place_of_the_pdf(api: str) -> None:
    async def work() -> None:
        upstream = Upstream()
        async with gateway(upstream, documents="pages", document_side=64) as client:
            answer = await post(client, api, document(api))
        assert answer.status_code == 200
        assert not upstream.received(PDF)
        (turn,) = upstream.body["input" if api == "responses" else "messages"]
        name, first, second, question = turn["content"]
        assert name == {"type": TEXT[api], "text": "report.pdf"}
        assert {first["type"], second["type"]} == {{"chat": "image_url", "messages": "image"}.get(api, "input_image")}
        assert question["text"] == "what?"
        marks = {"cache_control": {"type": "ephemeral"}}, {"prompt_cache_breakpoint": {"mode": "explicit"}}
        assert marks[api != "messages"].items() <= second.items()
        assert not {"cache_control", "prompt_cache_breakpoint"} & first.keys()
        shades = sorted(round(float(page.mean()), 2) for page in upstream.images())
        assert shades == [0.25, 0.75]  # the purifier inverts: .75 and .25

    run(work())


def test_pages_and_images_keep_their_order_and_count_together() -> None:
    async def work() -> None:
        upstream = Upstream()
        photo = {"type": "image_url", "image_url": {"url": url(png(3, height=32, width=64))}}
        flags = {"documents": "pages", "document_side": 64, "max_images": 5}
        async with gateway(upstream, **flags) as client:
            answer = await post(client, "chat", photo, document("chat", pdf(0.0)), photo, document("chat"))
            assert answer.status_code == 200
            refused = await post(client, "chat", photo, document("chat"), document("chat"), photo)
        kinds = [part["type"] for part in upstream.body["messages"][0]["content"]]
        assert kinds == ["image_url", "text", "image_url", "image_url", "text", "image_url", "image_url", "text"]
        assert refused.status_code == 400
        assert "has 2 pages; the limit is 1" in refused.text
        assert "messages[0].content[2]" in refused.text
        assert len(upstream.requests) == 1

    run(work())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"%PDF-1.7 broken", "damaged"),
        (png(1), "not a PDF"),
        (pdf(0.5, trailer=LOCK), "encrypted"),
        (pdf(0.5, catalog=SCRIPT), "scripts"),
        (b"%PDF-" + b"0" * 3000, "a document of"),
    ],
)
def test_bad_documents_are_refused_where_they_stand(data: bytes, message: str) -> None:
    async def work() -> None:
        upstream = Upstream()
        async with gateway(upstream, documents="pages", max_image_bytes=2000) as client:
            answer = await post(client, "chat", document("chat", data))
        assert answer.status_code in (400, 413)
        error = answer.json()["error"]
        assert message in error["message"]
        assert "messages[0].content[0]" in answer.text
        assert not upstream.requests

    run(work())


@pytest.mark.parametrize(
    "part",
    [
        {"type": "file", "file": {"file_id": "file-1"}},
        {"type": "file", "file": {"file_data": "https://example.org/x.pdf"}},
        {"type": "file", "file": {"file_data": 3}},
        {"type": "file", "file": {"file_data": b64(PDF), "image": url(png())}},
        {"type": "file", "file": {"file_data": b64(PDF), "filename": {"image": 1}}},
    ],
)
def test_files_that_are_not_sent_or_hide_something_are_refused(part: dict[str, Any]) -> None:
    async def work() -> None:
        upstream = Upstream()
        async with gateway(upstream, documents="pages") as client:
            assert (await post(client, "chat", part)).status_code == 400
        assert not upstream.requests

    run(work())


class Hanging(Worker):
    """Hangs on one of the documents."""

    def pages(self, data: bytes, room: int) -> list[bytes]:
        if data == PDF:
            time.sleep(60)
        return super().pages(data, room)


def build() -> Worker:
    return Hanging(Invert())


def test_documents_are_rendered_in_processes_and_a_hanging_one_is_ended() -> None:
    pool = Pool(build, PoolOptions(workers=1, timeout_s=3), name="hanging")
    pool.warm_up()

    async def work() -> None:
        upstream = Upstream()
        app = create_app(settings(documents="pages"), purifier=Invert(), transport=upstream.transport)
        app.state.lane.worker = pool
        async with gateway(upstream, app=app) as client:
            assert (await post(client, "chat", document("chat", pdf(0.5)))).status_code == 200
            answer = await post(client, "chat", document("chat"))
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "purification_timeout")
        assert len(upstream.requests) == 1

    try:
        run(work(), 120)
    finally:
        pool.close()


class Slow(Worker):
    """As a pool of two processes: two calls at a time. Documents and large images take until ``go`` is set."""

    def __init__(self) -> None:
        super().__init__(Invert())
        self.processes, self.go, self.held = threading.BoundedSemaphore(2), threading.Event(), 0

    def pages(self, data: bytes, room: int) -> list[bytes]:
        with self.processes:
            self.hold()
            return super().pages(data, room)

    def run(self, jobs: Sequence[Job], *, alone: bool = False) -> list[Result]:
        with self.processes:
            if any(job.pixels > 500_000 for job in jobs):
                self.hold()
            return super().run(jobs)

    def hold(self) -> None:
        self.held += 1
        assert self.go.wait(30)


def test_slow_documents_and_large_images_leave_a_worker_to_others() -> None:
    slow = Slow()

    async def work() -> None:
        upstream = Upstream()
        app = create_app(settings(documents="pages"), purifier=Invert(), transport=upstream.transport)
        app.state.lane.worker = slow
        async with gateway(upstream, app=app) as client:
            parts = [document("chat"), {"type": "image_url", "image_url": {"url": url(png(1, height=800, width=800))}}]
            parts += [document("chat", pdf(0.5))]
            tasks = [asyncio.create_task(post(client, "chat", part)) for part in parts]
            while not slow.held:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.2)
            small = {"type": "image_url", "image_url": {"url": url(png(2))}}
            answer = await asyncio.wait_for(post(client, "chat", small), 10)
            assert answer.status_code == 200
            assert slow.held == 1
            slow.go.set()
            assert [(await task).status_code for task in tasks] == [200, 200, 200]

    run(work(), 60)
