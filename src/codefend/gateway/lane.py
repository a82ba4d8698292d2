"""The purification lane: a bounded queue between the event loop and the worker's threads, with a cache of results.

The cache is keyed by content, so that sending one picture again and again until a randomized purifier lets it through
(the resubmission attack of DiffBreak, NeurIPS 2025) meets the first result every time.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from codefend.gateway.errors import Refused
from codefend.gateway.worker import Job, Purified, PurifyFailed, Result, Runner

Key = tuple[str, str, float | None]


@dataclass(eq=False)
class _Task:
    key: Key
    job: Job
    future: asyncio.Future[Result]
    waiters: int = 1  # requests that want this picture; at zero it leaves the queue


@dataclass(frozen=True)
class LaneOptions:
    queue_images: int = 64
    batch_images: int = 8
    threads: int = 2  # one decodes and encodes while the other is in the purifier
    torch_threads: int = 0  # per operation; 0 leaves PyTorch's own choice
    timeout_s: float = 30.0  # queueing and purification of one image
    cache_bytes: int = 256 << 20


@dataclass
class Lane:
    """Await ``lane(job)`` from one event loop. ``on_batch(images, seconds)`` is called from worker threads."""

    worker: Runner
    options: LaneOptions = field(default_factory=LaneOptions)
    on_batch: Callable[[int, float], None] = lambda images, seconds: None

    def __post_init__(self) -> None:
        self._queue: deque[_Task] = deque()
        self._ready = threading.Condition()
        self._pending: dict[Key, _Task] = {}  # queued or in the purifier; the event loop's own, like the cache
        self._cache: OrderedDict[Key, Purified] = OrderedDict()
        self._cached_bytes = 0
        self._seconds = 0.1  # per image, smoothed: what Retry-After is estimated from
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"purify-{i}", daemon=True) for i in range(self.options.threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def depth(self) -> int:
        """Images that wait, not counting those in the purifier."""
        return len(self._queue)

    @property
    def full(self) -> bool:
        return self.depth >= self.options.queue_images

    @property
    def cached_bytes(self) -> int:
        return self._cached_bytes

    async def __call__(self, job: Job, digest: str) -> Purified:
        """Purify, or answer from the cache. Raises Refused (503 when the queue is full) and PurifyFailed."""
        key = (digest, job.mode, job.threshold)
        hit = self._cache.get(key)
        if hit is not None:
            self._cache.move_to_end(key)
            return replace(hit, cached=True)
        task = self._pending.get(key)
        if task is None:
            task = self._enqueue(key, job)
        else:
            task.waiters += 1
        try:
            outcome = await asyncio.wait_for(asyncio.shield(task.future), self.options.timeout_s)
        except TimeoutError as error:
            raise PurifyFailed("timeout", f"not purified within {self.options.timeout_s:g} s") from error
        finally:
            task.waiters -= 1
            if task.waiters == 0 and not task.future.done():
                self._abandon(task)
        if not isinstance(outcome, Purified):
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

    def _enqueue(self, key: Key, job: Job) -> _Task:
        if self._closed:
            raise Refused(503, "shutting_down", "the gateway is shutting down", retry_after=5)
        if self.full:
            wait = max(1.0, self.depth * self._seconds)
            raise Refused(503, "queue_full", f"{self.depth} images are waiting already", retry_after=wait)
        task = _Task(key, job, asyncio.get_running_loop().create_future())
        self._pending[key] = task
        with self._ready:
            self._queue.append(task)
            self._ready.notify()
        return task

    def _abandon(self, task: _Task) -> None:
        """Take it out of the queue. What is in the purifier already is finished, for whoever sends it again."""
        with self._ready:
            if task not in self._queue:
                return
            self._queue.remove(task)
        del self._pending[task.key]

    # --- in the threads ---

    def _work(self) -> None:
        if self.options.torch_threads:
            torch.set_num_threads(self.options.torch_threads)
        while True:
            with self._ready:
                while not self._queue and not self._closed:
                    self._ready.wait()
                if not self._queue:
                    return
                tasks = [self._queue.popleft() for _ in range(min(len(self._queue), self._share()))]
            self._run(tasks)

    def _share(self) -> int:
        # Half of a short queue is left to the other thread, so that decoding overlaps with purifying.
        return min(self.options.batch_images, max(1, len(self._queue) // len(self._threads)))

    def _run(self, tasks: list[_Task]) -> None:
        start = time.perf_counter()
        try:
            results = self.worker.run([task.job for task in tasks])
        except BaseException as error:  # the thread must survive, and nobody may wait forever
            results = [PurifyFailed("exception", f"{type(error).__name__} in the worker")] * len(tasks)
        seconds = time.perf_counter() - start
        self.on_batch(len(tasks), seconds)
        for task, result in zip(tasks, results, strict=True):
            loop = task.future.get_loop()
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._settle, task, result, seconds / len(tasks))

    # --- in the event loop ---

    def _settle(self, task: _Task, result: Result, seconds: float) -> None:
        self._seconds += 0.2 * (seconds - self._seconds)
        del self._pending[task.key]
        if isinstance(result, Purified):
            self._remember(task.key, result)
        if not task.future.done():
            task.future.set_result(result)

    def _remember(self, key: Key, result: Purified) -> None:
        size = len(result.picture.data)
        if key in self._cache or size > self.options.cache_bytes // 4:
            return
        self._cache[key] = result
        self._cached_bytes += size
        while self._cached_bytes > self.options.cache_bytes:
            _, oldest = self._cache.popitem(last=False)
            self._cached_bytes -= len(oldest.picture.data)


def digest_of(data: bytes) -> str:
    """Name content by its SHA-256."""
    return hashlib.sha256(data).hexdigest()
