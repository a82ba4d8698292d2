"""Worker processes on one machine."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor


def worker_pool(workers: int, start: Callable[..., None] | None = None, *arguments: object) -> ProcessPoolExecutor:
    """A pool of fresh processes that share the cores; ``start(*arguments)``, picklable, runs first in each."""
    return ProcessPoolExecutor(workers, mp.get_context("spawn"), _start, (workers, start, arguments))


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
