"""Workers in processes: what ends one of them fails its own image, and nothing else."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from codefend.core import images
from codefend.gateway.errors import Refused
from codefend.gateway.pool import Pool, PoolOptions
from codefend.gateway.worker import Job, Purified, PurifyFailed, Worker
from codefend.types import CodefendError
from gateway_kit import CHAT, Invert, Upstream, chat, gateway, image, png, run, settings, wait_for

BLACK, WHITE, GREY = (images.encode(torch.full((3, 9, 9), shade)) for shade in (0.0, 1.0, 0.5))


class Fatal(Invert):
    """Black images crash the process, white ones hang it."""

    def forward(self, images: torch.Tensor, *, generator: Any = None) -> torch.Tensor:
        if bool((images.flatten(1).mean(1) == 0).any()):
            ctypes.string_at(0)
        if bool((images.flatten(1).mean(1) == 1).any()):
            time.sleep(60)
        return super().forward(images)


def build() -> Worker:
    return Worker(Fatal())


def build_broken() -> Worker:
    raise CodefendError("no such weights")


def build_slowly() -> Worker:
    time.sleep(60)
    return Worker(Fatal())


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    pool = Pool(build, PoolOptions(workers=1, timeout_s=3), name="fatal")
    pool.warm_up()
    yield pool
    pool.close()


def test_results_and_refusals_come_out_of_the_process(pool: Pool) -> None:
    good, bad = pool.run([Job(png(1)), Job(b"junk")])
    assert isinstance(good, Purified)
    assert good.image == Worker(Invert()).run([Job(png(1))])[0].image  # type: ignore[union-attr]
    assert isinstance(bad, Refused)
    assert (bad.status, bad.code) == (400, "invalid_image")
    with pytest.raises(Refused):
        pool.reencode(Job(b"junk"))
    assert not pool.reencode(Job(png(1))).purified


def test_a_crash_fails_its_own_image_only(pool: Pool) -> None:
    results = pool.run([Job(GREY), Job(BLACK), Job(png(2))])
    assert [type(result) for result in results] == [Purified, PurifyFailed, Purified]
    assert results[1].reason == "crashed"  # type: ignore[union-attr]


def test_a_process_that_hangs_is_ended_and_replaced(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    start = time.monotonic()
    with monkeypatch.context() as patch:
        patch.setattr(pool._children[0], "options", replace(pool.options, timeout_s=0.5))
        (result,) = pool.run([Job(WHITE)])
    assert isinstance(result, PurifyFailed)
    assert result.reason == "timeout"
    assert time.monotonic() - start < 10
    assert isinstance(pool.run([Job(GREY)])[0], Purified)


def test_a_hanging_image_fails_itself_and_not_its_batch(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(pool._children[0], "options", replace(pool.options, timeout_s=1.0))
        results = pool.run([Job(png(1)), Job(WHITE), Job(png(2, width=20))])
    assert [type(result) for result in results] == [Purified, PurifyFailed, Purified]
    assert results[1].reason == "timeout"  # type: ignore[union-attr]


def test_a_frozen_process_that_works_is_replaced(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even while a large image is being written to its pipe, which nobody reads."""
    child = pool._children[0]
    pool.run([Job(GREY)])
    os.kill(child._process.pid, signal.SIGSTOP)
    with monkeypatch.context() as patch:
        patch.setattr(child, "options", replace(pool.options, timeout_s=0.5))
        start = time.monotonic()
        (result,) = pool.run([Job(png(1) + bytes(2_000_000))])
    assert isinstance(result, PurifyFailed)
    assert result.reason == "timeout"
    assert time.monotonic() - start < 10
    assert isinstance(pool.run([Job(GREY)])[0], Purified)


def test_idle_processes_that_are_frozen_or_dead_are_replaced(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    from codefend.gateway import pool as module

    child, reasons = pool._children[0], list[str]()
    monkeypatch.setattr(pool, "on_restart", reasons.append)
    monkeypatch.setattr(module, "_PING_S", 0.3)
    for number in (signal.SIGSTOP, signal.SIGKILL):
        pool.run([Job(GREY)])
        process = child._process
        os.kill(process.pid, number)
        wait_for(lambda process=process: child._process not in (None, process) and child.answering, 30)
    assert reasons == ["frozen", "dead"]
    assert pool.answering == 1


def test_signals_to_the_group_do_not_end_a_worker(pool: Pool) -> None:
    process = pool._children[0]._process
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(process.pid, number)
    assert isinstance(pool.run([Job(png(3))])[0], Purified)
    assert pool._children[0]._process is process


def test_what_cannot_start_says_why() -> None:
    broken = Pool(build_broken, PoolOptions(workers=1), name="broken")
    with pytest.raises(CodefendError, match="no such weights"):
        broken.warm_up()


def test_the_gateway_purifies_in_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        from codefend.gateway.app import create_app

        upstream = Upstream()
        monkeypatch.setattr(images, "probe", lambda *_, **__: pytest.fail("decoders run in workers only"))
        app = create_app(settings(purifier="blur", workers=1), transport=upstream.transport)
        async with gateway(upstream, app=app) as client:
            assert isinstance(app.state.engine.worker, Pool)
            process = app.state.engine.worker._children[0]._process
            answer = await client.post(CHAT, json=chat(png(1)))
            process.kill()
            process.join()
            again = await client.post(CHAT, json=chat(png(2)))
            metrics = (await client.get("/metrics")).text
            app.state.engine.worker._children[0].answering = False
            unready = await client.get("/readyz")
        assert answer.status_code == again.status_code == 200, "a process that was killed is replaced at once"
        assert 'codefend_worker_restarts_total{reason="dead"} 1.0' in metrics
        assert "codefend_workers_answering 1.0" in metrics
        assert (unready.status_code, unready.json()["status"]) == (503, "no worker answers")
        assert not upstream.received(png(1), png(2))
        assert upstream.images()[0].shape == image(2).shape
        assert app.state.engine.worker._children[0]._process is None, "nothing is left running"

    run(work(), 60)


def test_a_pool_that_is_closed_while_it_starts_does_not_wait_for_its_processes() -> None:
    pool = Pool(build_slowly, PoolOptions(workers=1), name="slow")
    pool.close()  # as another thread may while the first process waits for the fork server
    start = time.monotonic()
    pool.warm_up()
    assert time.monotonic() - start < 50
    assert pool.answering == 0
