"""Workers in processes of their own: no image can stall the event loop, crash the gateway or hang for ever."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import multiprocessing as mp
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

from codefend.gateway.errors import Refused
from codefend.gateway.options import PoolOptions
from codefend.gateway.worker import Job, Purified, PurifyFailed, Result, Worker
from codefend.types import CodefendError

_NICE = 2  # below the event loop: on few cores it must not wait for a time slice behind an image
_START_S = 120.0  # importing PyTorch and loading weights on a busy machine
_REST_S = 1.0  # without work, until freed memory goes back to the system
_WATCH_S = 0.25  # between two looks of the watchdog
_PING_S = 5.0  # between two pings of an idle process, and until one that does not answer is replaced
_LIKELY_OOM_VICTIM = "500"  # of 1000: when memory runs out, the kernel takes a worker, not the gateway

Build = Callable[[], Worker]  # must be picklable


class Pool:
    """Does what a ``Worker`` does, in several processes. Thread-safe; each call keeps one process busy.

    A watchdog ends processes that exceed their deadline and replaces idle ones that are dead or do not answer.
    ``on_restart(reason)`` is called from its thread or a caller's.
    """

    def __init__(self, build: Build, options: PoolOptions, *, name: str, threshold: float | None = None) -> None:
        self.options, self.name, self.threshold = options, name, threshold
        self.seconds_per_pixel, self.weights = 0.0, ""
        self.on_restart: Callable[[str], None] = lambda reason: None
        self._children = [_Child(build, options, self._restarted) for _ in range(options.workers)]
        self._idle: list[_Child] = list(self._children)
        self._free = threading.Condition()
        self._closed = threading.Event()
        self._watchdog = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    @property
    def answering(self) -> int:
        """Processes that answered their last message."""
        return sum(child.answering for child in self._children)

    def warm_up(self) -> None:
        """Start all processes. Raises CodefendError when one cannot start, or cannot purify a grey image."""
        atexit.register(self.close)
        threads = [threading.Thread(target=child.launch, daemon=True) for child in self._children]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for child in self._children:
            if child.problem:
                self.close()
                raise CodefendError(child.problem)
        with contextlib.suppress(PurifyFailed):
            self.seconds_per_pixel = self._call("measure")
        self._watchdog.start()

    def run(self, jobs: Sequence[Job], *, alone: bool = False) -> list[Result]:
        """Purify every job. What ends the process (a crash, no memory, the deadline) fails its own image only.

        With ``alone`` nothing else is running, and the process may use all cores. An image in whose step the process
        crashed has one more try by itself: it may have been a neighbour's fault.
        """
        results: dict[int, Result] = {}
        waiting = list(range(len(jobs)))
        while waiting:
            part, culprits, failure = self._attempt([jobs[i] for i in waiting], alone)
            results |= {waiting[i]: result for i, result in part.items()}
            if failure is not None:
                suspects = [waiting[i] for i in culprits]
                results |= {i: self._retry(jobs[i], failure, single=len(suspects) == 1) for i in suspects}
            waiting = [i for i in waiting if i not in results]
        return [results[i] for i in range(len(jobs))]

    def _retry(self, job: Job, failure: PurifyFailed, *, single: bool) -> Result:
        if failure.reason == "timeout" and single:
            return failure
        part, _, again = self._attempt([job], False)
        return part.get(0) or again or failure

    def _attempt(
        self, jobs: Sequence[Job], alone: bool
    ) -> tuple[dict[int, Result], tuple[int, ...], PurifyFailed | None]:
        """Send jobs to one process: the results so far, and if it ended, at which jobs it was and why."""
        results: dict[int, Result] = {}
        current = tuple(range(len(jobs)))
        failure: PurifyFailed | None = None
        with self._claimed() as child:
            try:
                for answer in child.call("run", list(jobs), self._threads(alone)):
                    if isinstance(answer, PurifyFailed):
                        failure = answer
                        continue
                    current, outcome = answer
                    if outcome is not None:
                        results |= zip(current, outcome, strict=True)
            except PurifyFailed as error:
                failure = error
        return results, () if failure is None else tuple(i for i in current if i not in results), failure

    def _threads(self, alone: bool) -> int:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return self.options.torch_threads or (cores if alone else max(1, cores // self.options.workers))

    def reencode(self, job: Job) -> Purified:
        """Decode and encode without purifying. Raises Refused, and PurifyFailed when the process ends."""
        answer: Purified = self._call("reencode", job)
        return answer

    def pages(self, data: bytes, room: int) -> list[bytes]:
        """The pages of a PDF. Raises Refused, and PurifyFailed when the process ends."""
        files: list[bytes] = self._call("pages", data, room)
        return files

    def close(self) -> None:
        """End all processes, whatever they are doing."""
        atexit.unregister(self.close)
        self._closed.set()
        for child in self._children:
            child.end()

    def _call(self, verb: str, *arguments: Any) -> Any:
        with self._claimed() as child:
            (answer,) = child.call(verb, *arguments)
        if isinstance(answer, Exception):
            raise answer
        return answer

    @contextlib.contextmanager
    def _claimed(self) -> Iterator[_Child]:
        with self._free:
            self._free.wait_for(lambda: bool(self._idle))
            claimed = self._idle.pop()
        try:
            yield claimed
        finally:
            self._release(claimed)

    def _release(self, child: _Child) -> None:
        with self._free:
            self._idle.append(child)
            self._free.notify()

    def _restarted(self, reason: str) -> None:
        if not self._closed.is_set():
            self.on_restart(reason)

    def _watch(self) -> None:
        while not self._closed.wait(_WATCH_S):
            for child in self._children:
                child.enforce_deadline()
                if time.monotonic() - child.last_contact < _PING_S and child.alive:
                    continue
                with self._free:
                    if child not in self._idle:
                        continue
                    self._idle.remove(child)
                threading.Thread(target=self._check, args=(child,), daemon=True).start()

    def _check(self, child: _Child) -> None:
        try:
            child.ping()
        finally:
            self._release(child)


class _Child:
    """One process and the pipe to it; launched again after its end."""

    def __init__(self, build: Build, options: PoolOptions, restarted: Callable[[str], None]) -> None:
        self.build, self.options, self.restarted, self.problem = build, options, restarted, ""
        self.answering = False
        self.last_contact = time.monotonic()
        self._process: Any = None
        self._pipe: Connection | None = None
        self._deadline: float | None = None
        self._overdue = self._ended = False

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.is_alive()

    def launch(self) -> None:
        """Start and wait until it is warm; ``problem`` says why it is not."""
        context: Any = mp.get_context("forkserver" if "forkserver" in mp.get_all_start_methods() else "spawn")
        if context.get_start_method() == "forkserver":
            context.set_forkserver_preload(["codefend.gateway.pool", "codefend.purifiers.bridge"])
        ours, theirs = mp.Pipe()
        process = context.Process(target=_serve, args=(theirs, self.build), daemon=True)
        try:
            process.start()
        except Exception as error:  # no memory, no processes left
            self.problem = f"a worker process could not start: {error}"
            ours.close()
            return
        finally:
            theirs.close()
        self._process, self._pipe, self._overdue = process, ours, False
        if self._ended:  # while the fork server was importing PyTorch
            self._stop()
            return
        try:
            self.problem = ours.recv() if ours.poll(_START_S) else f"a worker did not start within {_START_S:g} s"
        except (EOFError, OSError):
            self.problem = "a worker process ended while it was starting"
        self.last_contact = time.monotonic()
        self.answering = not self.problem
        if self.problem or self._ended:
            self._stop()

    def call(self, verb: str, *arguments: Any) -> Iterator[Any]:
        """Yield the answers to one message. Raises PurifyFailed when the process ends or exceeds its deadline."""
        if not self.alive or self._pipe is None:
            self._relaunch("dead")
        if self._pipe is None:
            raise PurifyFailed("crashed", self.problem or "the gateway is shutting down")
        try:
            self._deadline = time.monotonic() + self.options.timeout_s
            self._pipe.send((verb, *arguments))
            while (answer := self._pipe.recv()) is not None:
                self._deadline = time.monotonic() + self.options.timeout_s
                yield answer
            self.last_contact = time.monotonic()
        except (EOFError, OSError) as error:
            reason = "timeout" if self._overdue else "crashed"
            self._fail(reason)
            if reason == "timeout":
                raise PurifyFailed(reason, f"not purified within {self.options.timeout_s:g} s") from error
            raise PurifyFailed(reason, "a worker process ended while it was purifying") from error
        finally:
            self._deadline = None

    def enforce_deadline(self) -> None:
        """End the process if it is overdue: a read from or a write to its pipe then fails, even of a frozen one."""
        deadline, process = self._deadline, self._process
        if deadline is not None and time.monotonic() > deadline and process is not None:
            self._overdue, self.answering = True, False
            with contextlib.suppress(ValueError):  # closed meanwhile
                process.kill()

    def ping(self) -> None:
        """Replace an idle process that is dead or does not answer."""
        if self._pipe is not None and self.alive:
            with contextlib.suppress(EOFError, OSError):
                self._pipe.send(("ping",))
                if self._pipe.poll(_PING_S):
                    self._pipe.recv()
                    self.last_contact = time.monotonic()
                    return
        self._relaunch("frozen" if self.alive else "dead")

    def _relaunch(self, reason: str) -> None:
        if self._process is not None:
            self._fail(reason)
        if not self._ended:
            self.launch()

    def _fail(self, reason: str) -> None:
        self.answering = False
        self._stop()
        self.restarted(reason)

    def end(self) -> None:
        self._ended = True
        self._stop()

    def _stop(self) -> None:
        process, self._process, pipe, self._pipe = self._process, None, self._pipe, None
        if process is not None:
            process.kill()
            process.join()
            process.close()
        if pipe is not None:
            pipe.close()


def _serve(pipe: Connection, build: Build) -> None:
    """The life of a worker process: until the pipe closes. Signals to the whole group are the gateway's to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with contextlib.suppress(AttributeError, ValueError):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        os.nice(_NICE)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as stream:
        stream.write(_LIKELY_OOM_VICTIM)
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, OSError):  # the gateway has ended
        try:
            worker = build()
            worker.warm_up()
        except Exception as error:
            pipe.send(str(error) or type(error).__name__)
            return
        pipe.send("")
        while True:
            if not pipe.poll(_REST_S):
                _give_back()
                pipe.poll(None)
            _answer(worker, pipe, *pipe.recv())


def _give_back() -> None:
    """Return what large images took: glibc keeps it, some 200 MB in each process after 1500 x 1500 photographs."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library has no such function
        ctypes.CDLL(None).malloc_trim(0)


def _answer(worker: Worker, pipe: Connection, verb: str, *arguments: Any) -> None:
    """Send every step or the one answer, then None. Errors are answers, too."""
    if verb == "ping":
        pipe.send("")
        return
    try:
        if verb == "run":
            jobs, threads = arguments
            torch.set_num_threads(threads)
            for step in worker.steps(jobs):
                pipe.send(step)
        else:
            verbs: dict[str, Callable[..., Any]] = {
                "measure": worker.measure,
                "reencode": worker.reencode,
                "pages": worker.pages,
            }
            pipe.send(verbs[verb](*arguments))
    except (Refused, PurifyFailed) as error:
        pipe.send(error)
    except (EOFError, OSError):
        raise
    except BaseException as error:
        pipe.send(PurifyFailed("exception", f"{type(error).__name__} in the worker"))
    pipe.send(None)
