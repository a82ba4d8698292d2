"""Ray: the engine of ``codefend purify --engine ray``, and `BatchPurifier` for Ray Data pipelines of your own.

import ray
from codefend.integrations.ray import BatchPurifier

images = ray.data.read_parquet("s3://bucket/in/")
purified = images.map_batches(
    BatchPurifier, fn_constructor_kwargs={"purifier": "bridge"}, batch_size=16, num_cpus=1,
    compute=ray.data.ActorPoolStrategy(min_size=1, max_size=8),
)
purified.write_parquet("s3://bucket/out/")
"""

from __future__ import annotations

import os
import pickle
import socket
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from codefend.core.assets import needs
from codefend.core.processes import keep_freed_memory
from codefend.purifiers.batches import BatchPurifier
from codefend.purifiers.corpus import Engine, Tick, Unit, UnitPurifier, UnitReport
from codefend.purifiers.corpus.stores import Store
from codefend.types import CodefendError

__all__ = ["BatchPurifier", "RayOptions", "UnitActor", "on_ray", "ray_pool"]

_OBJECT_STORE = 200 << 20  # bytes, of a cluster that is started here: units and reports are small
_BLOCKS = 10_000


@dataclass(frozen=True)
class RayOptions:
    """``workers`` is the most actors at a time; Ray starts as many as there is work for."""

    workers: int = 1
    cpus: float = 1
    gpus: float = 0
    address: str | None = None  # None: RAY_ADDRESS, else a cluster on this machine for the time of the job


class UnitActor:
    """Purifies units of a corpus, for ``map_batches``; loads the purifier at its first unit."""

    def __init__(self, purify: UnitPurifier, cpus: float) -> None:
        import torch

        torch.set_num_threads(max(1, int(cpus)))
        keep_freed_memory()
        self.purify = purify

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        # Pickles of this job's own driver and actors, as Ray itself exchanges them; nothing of the corpus is unpickled.
        answers = np.empty(len(batch["unit"]), dtype=object)
        answers[:] = [self._answer(pickle.loads(unit)) for unit in batch["unit"]]
        return {"answer": answers}

    def _answer(self, unit: Unit) -> bytes:
        try:
            return pickle.dumps(self.purify(unit))
        except CodefendError as error:  # ends the job; Ray would retry it and print a traceback
            return pickle.dumps(error)


def on_ray(options: RayOptions) -> Engine:
    """The engine of a Ray cluster, which must reach sources and sink: a shared file system or an object store.

    Raises CodefendError for a missing package and for a cluster that cannot be reached.
    """
    with needs("--engine ray", "ray"):
        import ray
        import ray.data

    def engine(purify: UnitPurifier, units: Iterable[Unit], tick: Tick) -> Iterator[UnitReport]:
        purify = replace(purify, sink=Store(_absolute(purify.sink.url)))
        with _cluster(ray, options):
            items = [{"unit": pickle.dumps(replace(unit, source=_absolute(unit.source)))} for unit in units]
            ray.data.DataContext.get_current().enable_progress_bars = False  # the job shows its own
            answers = ray.data.from_items(items, override_num_blocks=min(len(items), _BLOCKS)).map_batches(
                UnitActor,
                fn_constructor_args=(purify, options.cpus),
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(min_size=1, max_size=options.workers),
                num_cpus=options.cpus,
                num_gpus=options.gpus,
            )
            for row in answers.iter_rows():
                answer = pickle.loads(row["answer"])
                if isinstance(answer, CodefendError):
                    raise answer
                yield answer

    return engine


def ray_pool(options: RayOptions) -> Callable[..., Executor]:
    """Worker processes of `codefend.evaluate` as actors of a Ray cluster, which must share the run folder.

    Raises CodefendError as `on_ray`, before a run folder is created.
    """
    with needs("--engine ray", "ray"):
        import ray
    address = _address(options)
    if address and not ray.is_initialized():
        with _unreachable_named(address):
            _check_reachable(address)

    def start_pool(workers: int, start: Callable[..., None], *arguments: object) -> Executor:
        return _RayExecutor(ray, replace(options, workers=workers), start, arguments)

    return start_pool


class _CallActor:
    """Starts like a worker process, then calls what it is given."""

    def __init__(self, cpus: float, start: Callable[..., None], arguments: tuple[object, ...]) -> None:
        import torch

        torch.set_num_threads(max(1, int(cpus)))
        start(*arguments)

    def call(self, function: Callable[..., Any], arguments: tuple[object, ...]) -> Any:
        return function(*arguments)


class _RayExecutor(Executor):
    """Actors, each with one call at a time, as long as no more calls are submitted than there are actors."""

    def __init__(
        self, ray: Any, options: RayOptions, start: Callable[..., None], arguments: tuple[object, ...]
    ) -> None:
        self._ray, self._cluster = ray, _cluster(ray, options)
        self._cluster.__enter__()
        actor = ray.remote(num_cpus=options.cpus, num_gpus=options.gpus)(_CallActor)
        self._idle = [actor.remote(options.cpus, start, arguments) for _ in range(options.workers)]

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **_: Any) -> Future[Any]:
        actor, future = self._idle.pop(), Future[Any]()
        answer = actor.call.remote(function, arguments).future()
        answer.add_done_callback(lambda answer: self._pass_on(actor, answer, future))
        return future

    def _pass_on(self, actor: Any, answer: Future[Any], future: Future[Any]) -> None:
        self._idle.append(actor)
        error = answer.exception()
        if isinstance(error, self._ray.exceptions.RayTaskError):
            error = error.cause
        if isinstance(error, self._ray.exceptions.RayActorError):
            error = BrokenExecutor(str(error))
        if error is None:
            future.set_result(answer.result())
        else:
            future.set_exception(error)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._cluster.__exit__(None, None, None)


@contextmanager
def _cluster(ray: Any, options: RayOptions) -> Iterator[None]:
    """Connect to the cluster, or start one on this machine; both end with the block. One that is there stays."""
    if ray.is_initialized():
        yield
        return
    address = _address(options)
    quiet = {"logging_level": "warning", "log_to_driver": False, "include_dashboard": False}
    with _unreachable_named(address):
        if address:
            _check_reachable(address)
            ray.init(address=address, logging_level="warning", log_to_driver=False)
        else:
            cores = max(1, round(options.workers * options.cpus))
            ray.init(address="local", num_cpus=cores, object_store_memory=_OBJECT_STORE, **quiet)
    try:
        yield
    finally:
        ray.shutdown()


def _address(options: RayOptions) -> str | None:
    """The cluster's address; None: one on this machine."""
    return options.address or os.environ.get("RAY_ADDRESS")


@contextmanager
def _unreachable_named(address: str | None) -> Iterator[None]:
    """Turn any error inside into a CodefendError that names the cluster."""
    try:
        yield
    except Exception as error:  # a node that does not start in time is a bare one
        reason = " ".join(str(error).split())[:200]
        raise CodefendError(f"cannot reach the Ray cluster at {address or 'this machine'}: {reason}") from error


def _check_reachable(address: str) -> None:
    """Raise OSError for an address that does not answer: Ray itself waits for minutes."""
    url = urlsplit(address if "://" in address else f"ray://{address}")
    if url.hostname and url.port:
        socket.create_connection((url.hostname, url.port), timeout=10).close()


def _absolute(url: str) -> str:
    """Workers have working folders of their own."""
    return url if "://" in url else os.path.abspath(url)
