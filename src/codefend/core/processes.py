"""Worker processes on one machine, and their memory."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing as mp
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, ProcessPoolExecutor, wait
from typing import TypeVar

from codefend.types import CodefendError

T = TypeVar("T")
R = TypeVar("R")
StartPool = Callable[..., Executor]  # workers, a function that starts each of them, its arguments
KILLED = "a worker process was killed, perhaps for lack of memory; use fewer --workers and rerun to resume"
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt(3)


def worker_pool(workers: int, start: Callable[..., None] | None = None, *arguments: object) -> ProcessPoolExecutor:
    """A pool of fresh processes that share the cores; ``start(*arguments)``, picklable, runs first in each."""
    return ProcessPoolExecutor(workers, mp.get_context("spawn"), _start, (workers, start, arguments))


def map_in_order(pool: Executor, workers: int, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """``function`` of each item, in order, with at most ``workers`` calls at a time; shuts the pool down in the end.

    Raises CodefendError when a process is killed.
    """
    waiting, results = deque(items), deque[Future[R]]()
    try:
        while waiting or results:
            running = {result for result in results if not result.done()}
            while waiting and len(running) < workers:
                results.append(pool.submit(function, waiting.popleft()))
                running.add(results[-1])
            wait(running, return_when=FIRST_COMPLETED)
            while results and results[0].done():
                yield results.popleft().result()
    except BrokenExecutor as error:
        raise CodefendError(KILLED) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def keep_freed_memory() -> None:
    """Have this process reuse the memory of freed tensors, for jobs that purify image after image.

    The C library gives large blocks back to the system and gets them again, page by page, for every layer of a network:
    a tenth of the time. The peak of the memory stays. Nothing happens with other C libraries than glibc.
    """
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL("libc.so.6")
        library.mallopt(_MMAP_THRESHOLD, 1 << 30)
        library.mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)


def _start(workers: int, start: Callable[..., None] | None, arguments: tuple[object, ...]) -> None:
    """Leave Ctrl-C to the parent, and end with it, even if it is killed."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(1, cores // workers))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if start is not None:
        start(*arguments)


def _end_with_parent() -> None:
    parent = mp.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
