"""Workers in processes of their own: no picture can stall the event loop, crash the gateway or hang for ever."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import multiprocessing as mp
import os
import queue
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import torch

from codefend.gateway.errors import Refused
from codefend.gateway.worker import Job, Purified, PurifyFailed, Result, Worker
from codefend.types import CodefendError

_NICE = 2  # below the event loop: on few cores it must not wait for a time slice behind a picture
_START_S = 120.0  # importing PyTorch and loading weights on a busy machine
_REST_S = 1.0  # without work, until freed memory goes back to the system
_LIKELY_OOM_VICTIM = "500"  # of 1000: when memory runs out, the kernel takes a worker, not the gateway

Build = Callable[[], Worker]  # must be picklable


@dataclass(frozen=True)
class PoolOptions:
    processes: int = 2
    torch_threads: int = 0  # in one process; 0 shares the cores out
    timeout_s: float = 30.0  # for one batch; a process that takes longer is ended and replaced


class Pool:
    """Does what a ``Worker`` does, in several processes. Thread-safe; each call keeps one process busy."""

    def __init__(self, build: Build, options: PoolOptions, *, name: str, threshold: float | None = None) -> None:
        self.options, self.name, self.threshold = options, name, threshold
        self._children = [_Child(build, options) for _ in range(options.processes)]
        self._idle: queue.LifoQueue[_Child] = queue.LifoQueue()
        for child in self._children:
            self._idle.put(child)

    def warm_up(self) -> None:
        """Start all processes. Raises CodefendError when one cannot start, or cannot purify a grey picture."""
        atexit.register(self.close)
        threads = [threading.Thread(target=child.launch) for child in self._children]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for child in self._children:
            if child.problem:
                self.close()
                raise CodefendError(child.problem)

    def run(self, jobs: Sequence[Job]) -> list[Result]:
        """Purify every job. What ends the process (a crash, no memory, the deadline) fails its own picture only.

        After a crash each picture of the batch has one more try by itself: it may have been a neighbour's fault.
        """
        results = self._run(jobs)
        if any(isinstance(result, PurifyFailed) and result.reason == "crashed" for result in results):
            return [result for job in jobs for result in self._run([job])]
        return results

    def _run(self, jobs: Sequence[Job]) -> list[Result]:
        try:
            answer: list[Result] = self._call("run", list(jobs))
        except PurifyFailed as failure:
            return [failure] * len(jobs)
        return answer

    def reencode(self, job: Job) -> Purified:
        """Decode and encode without purifying. Raises Refused, and PurifyFailed when the process ends."""
        answer: Purified = self._call("reencode", job)
        return answer

    def close(self) -> None:
        """End all processes, whatever they are doing."""
        atexit.unregister(self.close)
        for child in self._children:
            child.end()

    def _call(self, verb: str, argument: Any) -> Any:
        child = self._idle.get()
        try:
            return child.call(verb, argument)
        finally:
            self._idle.put(child)


class _Child:
    """One process and the pipe to it; launched again after its end, when there is work."""

    def __init__(self, build: Build, options: PoolOptions) -> None:
        self.build, self.options, self.problem = build, options, ""
        self._process: Any = None
        self._pipe: Connection | None = None
        self._ended = False

    def launch(self) -> None:
        """Start and wait until it is warm; ``problem`` says why it is not."""
        context: Any = mp.get_context("forkserver" if "forkserver" in mp.get_all_start_methods() else "spawn")
        if context.get_start_method() == "forkserver":
            context.set_forkserver_preload(["codefend.gateway.pool", "codefend.purifiers.bridge"])
        ours, theirs = mp.Pipe()
        options = replace(self.options, torch_threads=self.options.torch_threads or _fair_threads(self.options))
        process = context.Process(target=_serve, args=(theirs, self.build, options), daemon=True)
        try:
            process.start()
        except Exception as error:  # no memory, no processes left
            self.problem = f"a worker process could not start: {error}"
            ours.close()
            return
        finally:
            theirs.close()
        self._process, self._pipe = process, ours
        try:
            self.problem = ours.recv() if ours.poll(_START_S) else f"a worker did not start within {_START_S:g} s"
        except (EOFError, OSError):
            self.problem = "a worker process ended while it was starting"
        if self.problem:
            self._stop()

    def call(self, verb: str, argument: Any) -> Any:
        if self._pipe is None:
            if not self._ended:
                self.launch()
            if self._pipe is None:
                raise PurifyFailed("crashed", self.problem or "the gateway is shutting down")
        try:
            self._pipe.send((verb, argument))
            if not self._pipe.poll(self.options.timeout_s):
                self._stop()
                raise PurifyFailed("timeout", f"not purified within {self.options.timeout_s:g} s")
            answer = self._pipe.recv()
        except (EOFError, OSError) as error:
            self._stop()
            raise PurifyFailed("crashed", "a worker process ended while it was purifying") from error
        if isinstance(answer, (Refused, PurifyFailed)):
            raise answer
        return answer

    def end(self) -> None:
        self._ended = True
        self._stop()

    def _stop(self) -> None:
        process, self._process, pipe, self._pipe = self._process, None, self._pipe, None
        if pipe is not None:
            pipe.close()
        if process is not None:
            process.kill()
            process.join()
            process.close()


def _fair_threads(options: PoolOptions) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // options.processes)


def _serve(pipe: Connection, build: Build, options: PoolOptions) -> None:
    """The life of a worker process: until the pipe closes. Signals to the whole group are the gateway's to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        os.nice(_NICE)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as stream:
        stream.write(_LIKELY_OOM_VICTIM)
    torch.set_num_threads(options.torch_threads)
    try:
        worker = build()
        worker.warm_up()
    except Exception as error:
        pipe.send(str(error) or type(error).__name__)
        return
    pipe.send("")
    with contextlib.suppress(EOFError, OSError):
        while True:
            if not pipe.poll(_REST_S):
                _give_back()
            verb, argument = pipe.recv()
            pipe.send(_answer(worker, verb, argument))


def _give_back() -> None:
    """What large pictures took: glibc keeps it, some 200 MB in each process after photographs of 1500 pixels a side."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library has no such function
        ctypes.CDLL(None).malloc_trim(0)


def _answer(worker: Worker, verb: str, argument: Any) -> Any:
    try:
        return worker.run(argument) if verb == "run" else worker.reencode(argument)
    except (Refused, PurifyFailed) as error:
        return error
    except BaseException as error:
        return PurifyFailed("exception", f"{type(error).__name__} in the worker")
