"""The lane counts pixels: what cannot be done in time is refused, small images go first, caches know pixels."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import pytest

from codefend.gateway.errors import Refused
from codefend.gateway.lane import OVERHEAD_PIXELS, READING_PIXELS, Lane
from codefend.gateway.options import LaneOptions
from codefend.gateway.rewrite import EncodedImage
from codefend.gateway.worker import Job, Purified, Result, Worker
from gateway_kit import Invert, png, run

MEGAPIXEL = 1_000_000


class Held:
    """A runner that holds jobs until it is told to go on, and says in which order they came."""

    name, threshold = "held", None

    def __init__(self, seconds_per_pixel: float = 1e-6) -> None:
        self.seconds_per_pixel = seconds_per_pixel
        self.gate, self.order = threading.Semaphore(0), list[int]()

    def run(self, jobs: Sequence[Job], *, alone: bool = False) -> list[Result]:
        self.order += [job.pixels for job in jobs]
        assert self.gate.acquire(timeout=10)
        return [Purified(EncodedImage("image/png", "AAAA"), digest=str(job.pixels)) for job in jobs]

    def reencode(self, job: Job) -> Purified:
        raise NotImplementedError

    def warm_up(self) -> None: ...
    def close(self) -> None: ...


async def send(lane: Lane, *pixels: int) -> list[asyncio.Task[Purified]]:
    tasks = []
    for count in pixels:
        tasks.append(asyncio.create_task(lane(Job(b"", pixels=count), str(count))))
        await asyncio.sleep(0.02)
    return tasks


def test_small_images_pass_large_ones_and_keep_a_worker() -> None:
    async def work() -> None:
        runner = Held()
        lane = Lane(runner, LaneOptions(workers=2, batch_images=1))
        tasks = await send(lane, 3 * MEGAPIXEL, 4 * MEGAPIXEL)
        assert runner.order == [3 * MEGAPIXEL], "one large image at a time: the other worker is for small ones"
        tasks += await send(lane, 100_001, 100_002, 100_003)
        assert runner.order == [3 * MEGAPIXEL, 100_001]
        for _ in range(5):
            runner.gate.release()
            await asyncio.sleep(0.05)
        await asyncio.gather(*tasks)
        assert runner.order[-1] == 4 * MEGAPIXEL
        await lane.close()

    run(work())


def test_a_large_image_does_not_wait_for_ever() -> None:
    async def work() -> None:
        runner = Held()
        lane = Lane(runner, LaneOptions(workers=1, batch_images=1))
        tasks = await send(lane, 100_000, 2 * MEGAPIXEL)
        lane._large[0][2].arrival -= 10
        lane._large[0] = (lane._priority(lane._large[0][2]), *lane._large[0][1:])
        tasks += await send(lane, 100_001)
        for _ in range(3):
            runner.gate.release()
            await asyncio.sleep(0.05)
        await asyncio.gather(*tasks)
        assert runner.order == [100_000, 2 * MEGAPIXEL, 100_001]
        await lane.close()

    run(work())


def test_what_cannot_be_purified_in_time_is_refused_when_it_arrives() -> None:
    async def work() -> None:
        runner = Held()
        lane = Lane(runner, LaneOptions(workers=1, timeout_s=10, batch_images=1))
        with pytest.raises(Refused) as never:
            await lane(Job(b"", pixels=12 * MEGAPIXEL), "x")
        assert (never.value.status, never.value.code) == (413, "image_too_large")
        assert never.value.retry_after is None, "it will never be in time"
        tasks = await send(lane, 4 * MEGAPIXEL, 5 * MEGAPIXEL)
        with pytest.raises(Refused) as later:
            await lane(Job(b"", pixels=6 * MEGAPIXEL), "y")
        assert (later.value.status, later.value.code) == (503, "queue_full")
        assert 4 <= (later.value.retry_after or 0) <= 5.2, "when what is ahead will be done"
        tasks += await send(lane, 50_000)
        for _ in tasks:
            runner.gate.release()
        await asyncio.gather(*tasks)
        await lane.close()

    run(work())


def test_the_queue_counts_pixels() -> None:
    async def work() -> None:
        runner = Held()
        lane = Lane(runner, LaneOptions(workers=1, queue_pixels=MEGAPIXEL, batch_images=1))
        tasks = await send(lane, 200_000, 500_000)
        assert lane.pixels == 700_000 + 2 * OVERHEAD_PIXELS
        with pytest.raises(Refused, match="pixels are waiting already"):
            await lane(Job(b"", pixels=500_001), "y")
        for _ in tasks:
            runner.gate.release()
        await asyncio.gather(*tasks)
        assert lane.pixels == 0
        await lane.close()

    run(work())


def test_shrinking_counts() -> None:
    lane = Lane(Worker(Invert()), LaneOptions(max_side=2048))
    assert lane.cost(48 * MEGAPIXEL) == 2048 * 2048 + OVERHEAD_PIXELS
    assert lane.cost(MEGAPIXEL, "report") - lane.cost(MEGAPIXEL) == READING_PIXELS + 0.3 * MEGAPIXEL


def test_files_with_the_same_pixels_share_one_entry_and_clients_none() -> None:
    async def work() -> None:
        lane = Lane(Worker(Invert()))
        variants: list[Any] = [png(1) + bytes([i]) for i in range(6)]
        for i, data in enumerate(variants):
            assert not (await lane(Job(data), f"file-{i}", "a")).cached
        assert (await lane(Job(variants[3]), "file-3", "a")).cached
        assert len(lane._cache) == 1, "variants of one image cannot push others out"
        assert not (await lane(Job(variants[3]), "file-3", "b")).cached, "what another client has sent is its own"
        await lane.close()

    run(work())
