"""The purification lane: a queue between the event loop and the workers, bounded by what can be purified in time.

Small images go first, large ones (over `LARGE_S`) never take the last worker, and an image that could not be purified
before its deadline is refused when it arrives. How long an image takes is estimated from its pixels. Documents are
rendered as large images are purified.
"""

from __future__ import annotations

import asyncio
import hashlib
import heapq
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from cachetools import LRUCache

from codefend.gateway.errors import Refused
from codefend.gateway.options import LaneOptions
from codefend.gateway.shared_cache import SharedCache
from codefend.gateway.worker import Job, Purified, PurifyFailed, Result, Runner

if TYPE_CHECKING:
    from codefend.purifiers.text_policy import TextPolicyName

Key = tuple[str, str, str, float | None, str]  # client, digest of the file or its pixels, mode, threshold, text policy

LARGE_S = 1.0  # seconds of work from which an image counts as large
OVERHEAD_PIXELS = 50_000  # what decoding, encoding and sending cost, as pixels
READING_PIXELS, READING_SHARE = 500_000, 0.3  # what OCR costs besides: of a dozen lines, and for each pixel
DOCUMENT_S = 1.0  # seconds of work that a document counts as; nobody knows before it is rendered
_GUESS = 2e-6  # seconds per pixel before anything was measured
_SMOOTHING = 0.2
_ALIASES = 20_000  # files whose pixels are known


@dataclass(frozen=True)
class _Document:
    """A PDF file to render, of ``room`` pages at most."""

    data: bytes
    room: int


_Answer = Result | list[bytes]  # of an image, of a document


@dataclass(eq=False)
class _Task:
    key: Key
    job: Job | _Document
    cost: int  # pixels
    future: asyncio.Future[_Answer]
    large: bool = False
    arrival: float = field(default_factory=time.monotonic)
    started: float | None = None
    waiters: int = 1  # requests that wait for this image; at zero it leaves the queue


@dataclass
class Lane:
    """Await ``lane(job)`` from one event loop. ``on_batch(images, seconds)`` is called from worker threads."""

    worker: Runner
    options: LaneOptions = field(default_factory=LaneOptions)
    on_batch: Callable[[int, float], None] = lambda images, seconds: None
    shared: SharedCache | None = None  # results of other replicas

    def __post_init__(self) -> None:
        self._ready = threading.Condition()
        self._small: list[tuple[float, int, _Task]] = []  # heaps, in order of arrival and estimated work
        self._large: list[tuple[float, int, _Task]] = []
        self._numbers = itertools.count()
        self._running: set[_Task] = set()
        self._running_large = 0
        self._pending: dict[Key, _Task] = {}  # queued or running; the event loop's own, like the cache
        self._cache: LRUCache[Key, Purified] = LRUCache(self.options.cache_bytes, getsizeof=_size)
        self._aliases: LRUCache[Key, Key] = LRUCache(_ALIASES)
        self._rate = 0.0
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"purify-{i}", daemon=True) for i in range(self.options.workers)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def rate(self) -> float:
        """Seconds per pixel of one worker, smoothed over what was purified."""
        return self._rate or self.worker.seconds_per_pixel or _GUESS

    @property
    def depth(self) -> int:
        """Images that wait, not counting those in a worker."""
        return len(self._small) + len(self._large)

    @property
    def pixels(self) -> int:
        """Pixels of the images that wait or are in a worker, after shrinking."""
        with self._ready:
            return sum(task.cost for task in (*self._running, *self._waiting()))

    @property
    def backlog_s(self) -> float:
        """Seconds until everything that waits or runs is done, by estimate."""
        return self.pixels * self.rate / len(self._threads)

    @property
    def full(self) -> bool:
        return self.depth >= self.options.queue_images

    @property
    def cached_bytes(self) -> int:
        return int(self._cache.currsize)

    def cost(self, pixels: int, text: TextPolicyName = "off") -> int:
        """The work of an image as a number of pixels: those that remain after shrinking, the overhead, and OCR."""
        side = self.options.max_side
        work = min(pixels, side * side) if side else pixels
        reading = 0 if text == "off" else READING_PIXELS + round(READING_SHARE * work)
        return work + OVERHEAD_PIXELS + reading

    async def __call__(self, job: Job, digest: str, client: str = "") -> Purified:
        """Purify, or answer from the cache. Raises Refused (413, 503) for what would take too long, and PurifyFailed.

        Clients share no results: an answer from the cache would tell one that another has sent the same image.
        """
        key = (client, digest, job.mode, job.threshold, job.text)
        hit = self._cache.get(self._aliases.get(key, key))
        if hit is not None:
            return replace(hit, cached=True)
        task = self._pending.get(key)
        if task is None:
            cost = self.cost(job.pixels, job.text) * max(1, job.frames)
            task = self._enqueue(key, job, cost, large=cost * self.rate > LARGE_S)
        else:
            task.waiters += 1
        outcome = await self._outcome(task)
        assert isinstance(outcome, Purified)
        return outcome

    async def pages(self, data: bytes, room: int) -> list[bytes]:
        """The pages of a PDF file, ``room`` at most, as PNG files. Raises as for an image."""
        key = ("", f"document {next(self._numbers)}", "purify", None, "off")
        pages = await self._outcome(
            self._enqueue(key, _Document(data, room), round(DOCUMENT_S / self.rate), large=True)
        )
        assert isinstance(pages, list)
        return pages

    async def _outcome(self, task: _Task) -> Purified | list[bytes]:
        try:
            outcome = await asyncio.wait_for(asyncio.shield(task.future), self.options.timeout_s)
        except TimeoutError as error:
            raise PurifyFailed("timeout", f"not purified within {self.options.timeout_s:g} s") from error
        finally:
            task.waiters -= 1
            if task.waiters == 0 and not task.future.done():
                self._abandon(task)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def close(self, timeout_s: float = 30.0) -> None:
        """Finish what is queued, then end the threads."""
        with self._ready:
            self._closed = True
            self._ready.notify_all()
        end = time.monotonic() + timeout_s
        for thread in self._threads:
            await asyncio.to_thread(thread.join, max(0.0, end - time.monotonic()))

    def _enqueue(self, key: Key, job: Job | _Document, cost: int, *, large: bool) -> _Task:
        if self._closed:
            raise Refused(503, "shutting_down", "the gateway is shutting down", retry_after=5)
        task = _Task(key, job, cost, asyncio.get_running_loop().create_future(), large)
        with self._ready:
            self._check_room(task)
            heap = self._large if task.large else self._small
            heapq.heappush(heap, (self._priority(task), next(self._numbers), task))
            self._ready.notify()
        self._pending[key] = task
        return task

    def _check_room(self, task: _Task) -> None:
        options, work = self.options, task.cost * self.rate
        if isinstance(task.job, Job) and task.cost * self.worker.seconds_per_pixel > options.timeout_s:
            message = (
                f"an image of {task.job.pixels:,} pixels takes over {options.timeout_s:g} s here; send a smaller one"
            )
            raise Refused(413, "image_too_large", message)
        ahead = self._seconds_ahead(task)
        late = ahead + work - options.timeout_s
        if self.depth >= options.queue_images:
            message = f"{self.depth} images are waiting already"
            raise Refused(503, "queue_full", message, retry_after=max(1.0, ahead / (self.depth + 1), late))
        waiting = sum(other.cost for other in self._waiting())
        if options.queue_pixels and waiting and waiting + task.cost > options.queue_pixels:
            raise Refused(503, "queue_full", f"{waiting:,} pixels are waiting already", retry_after=max(1.0, late))
        if ahead and late > 0:
            raise Refused(503, "queue_full", f"{ahead:.0f} s of work are waiting already", retry_after=max(1.0, late))

    def _seconds_ahead(self, task: _Task) -> float:
        """Until a worker is free for the task, by estimate."""
        now, priority = time.monotonic(), self._priority(task)
        running = sum(max(0.0, other.cost * self.rate - (now - (other.started or now))) for other in self._running)
        waiting = sum(other.cost * self.rate for at, _, other in (*self._small, *self._large) if at <= priority)
        slots = self._large_slots if task.large else len(self._threads)
        return (running + waiting) / slots if len(self._running) >= slots or waiting else 0.0

    def _priority(self, task: _Task) -> float:
        return task.arrival + task.cost * self.rate  # large ones wait for smaller, but never for ever

    @property
    def _large_slots(self) -> int:
        return max(1, len(self._threads) - 1)

    def _waiting(self) -> Sequence[_Task]:
        return [task for _, _, task in (*self._small, *self._large)]

    def _abandon(self, task: _Task) -> None:
        """Take it out of the queue. What is in a worker already is finished, for whoever sends it again."""
        with self._ready:
            for heap in (self._small, self._large):
                for entry in heap:
                    if entry[2] is task:
                        heap.remove(entry)
                        heapq.heapify(heap)
                        del self._pending[task.key]
                        return

    # --- in the threads ---

    def _work(self) -> None:
        if self.options.torch_threads:
            torch.set_num_threads(self.options.torch_threads)
        while True:
            with self._ready:
                while not (batch := self._take()):
                    if self._closed and not self.depth:
                        return
                    self._ready.wait()
                large = batch[0].large
                self._running_large += large
                alone = not self._running and not self.depth
                self._running |= set(batch)
                for task in batch:
                    task.started = time.monotonic()
            self._run(batch, alone)
            with self._ready:
                self._running -= set(batch)
                self._running_large -= large
                self._ready.notify_all()

    def _take(self) -> list[_Task]:
        """The next batch: one large image, or some small ones. Half of a short queue is left to the other threads."""
        may_large = bool(self._large) and self._running_large < self._large_slots
        if may_large and (not self._small or self._large[0] < self._small[0]):
            return [heapq.heappop(self._large)[2]]
        share = min(self.options.batch_images, max(1, len(self._small) // len(self._threads)))
        batch: list[_Task] = []
        while self._small and len(batch) < share:
            pixels = sum(task.cost for task in batch) + self._small[0][2].cost
            if batch and pixels > self.options.batch_pixels + OVERHEAD_PIXELS * len(batch):
                break
            batch.append(heapq.heappop(self._small)[2])
        return batch

    def _run(self, tasks: list[_Task], alone: bool) -> None:
        start = time.perf_counter()
        try:
            results = self._results(tasks, alone)
        except (Refused, PurifyFailed) as error:
            results = [error]
        except BaseException as error:  # the thread must survive, and nobody may wait forever
            results = [PurifyFailed("exception", f"{type(error).__name__} in the worker")] * len(tasks)
        if isinstance(tasks[0].job, Job):
            self._measure(tasks, results, time.perf_counter() - start)
        for task, result in zip(tasks, results, strict=True):
            loop = task.future.get_loop()
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._settle, task, result)

    def _measure(self, tasks: Sequence[_Task], results: Sequence[_Answer], seconds: float) -> None:
        self.on_batch(len(tasks), seconds)
        if all(isinstance(result, Purified) and not result.cached for result in results):
            rate = seconds / sum(task.cost for task in tasks)
            self._rate = self.rate + _SMOOTHING * (rate - self.rate)

    def _results(self, tasks: Sequence[_Task], alone: bool) -> Sequence[_Answer]:
        """The pages of a document, which comes alone; images from the shared cache, the rest from the worker."""
        document = tasks[0].job
        if isinstance(document, _Document):
            return [self.worker.pages(document.data, document.room)]
        jobs = [(task.key[0], task.job) for task in tasks if isinstance(task.job, Job)]
        known = [None] * len(jobs) if self.shared is None else self.shared.fetch(jobs)
        todo = [place for place, result in enumerate(known) if result is None]
        fresh = self.worker.run([jobs[place][1] for place in todo], alone=alone) if todo else []
        results = dict(zip(todo, fresh, strict=True))
        if self.shared is not None:
            self.shared.store([(*jobs[i], result) for i, result in results.items() if isinstance(result, Purified)])
        return [result or results[place] for place, result in enumerate(known)]

    # --- in the event loop ---

    def _settle(self, task: _Task, result: _Answer) -> None:
        del self._pending[task.key]
        if isinstance(result, Purified):
            self._remember(task.key, result)
        if not task.future.done():
            task.future.set_result(result)

    def _remember(self, key: Key, result: Purified) -> None:
        """Keep a result under its pixels: files that differ in metadata alone share it."""
        if not result.digest or _size(result) > self.options.cache_bytes // 4:
            return
        pixels = (key[0], f"pixels:{result.digest}", *key[2:])
        self._aliases[key] = pixels
        self._cache[pixels] = result


def _size(result: Purified) -> int:
    return len(result.image.data)


def digest_of(data: bytes) -> str:
    """Name a file by its SHA-256."""
    return hashlib.sha256(data).hexdigest()
