"""The curve of a training in an experiment tracker, by the trackers of `accelerate`: a view beside ``rows.jsonl``.

What decides is the run folder: the tracker hears of a row when it is on disk, a training that is resumed sends the new
ones only, and a tracker that breaks off is left out with a warning. It is no part of the recorded config.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from codefend.core.runs import Run, listening
from codefend.types import CodefendError

PROJECT = "codefend"
NAMED = {"wandb": "name", "mlflow": "run_name", "trackio": "name"}  # how each is told the run folder's name


@contextmanager
def tracked(name: str) -> Iterator[None]:
    """Inside the block, send the figures of every training step to tracker ``name`` as well; "" is none.

    Raises CodefendError when it is unknown, isn't installed, or cannot start.
    """
    if not name:
        yield
        return
    mirror = Mirror(name)
    try:
        with listening(mirror.hear):
            yield
    finally:
        mirror.finish()


class Mirror:
    """Hears the rows of a run; opens its tracker with the first, in the only process that writes any."""

    def __init__(self, name: str) -> None:
        """Raises CodefendError when the tracker is unknown or isn't installed."""
        self.name, self.kind = name, _find(name)
        self.tracker: Any = None
        self.broken = False

    def hear(self, run: Run, row: Mapping[str, Any]) -> None:
        if self.broken or "step" not in row:
            return
        if self.tracker is None:
            self.tracker = self._open(run)
        figures = {key: float(value) for key, value in row.items() if isinstance(value, int | float) and key != "step"}
        self._try("log", figures, step=row["step"])

    def finish(self) -> None:
        if self.tracker is not None and not self.broken:
            self._try("finish")

    def _open(self, run: Run) -> Any:
        named = {NAMED[self.name]: run.dir.resolve().name} if self.name in NAMED else {}
        settings = {key: value if isinstance(value, int | float) else str(value) for key, value in run.config.items()}
        try:
            # One that writes files does so inside the run folder, and calls its own folder there by this name.
            own = self.kind.requires_logging_directory
            tracker = self.kind(self.name, run.dir) if own else self.kind(PROJECT, **named)
            tracker.start()
            tracker.store_init_configuration(settings)
        except Exception as error:  # each tracker has errors of its own
            raise CodefendError(f"the tracker {self.name} cannot start: {_said(error)}") from error
        return tracker

    def _try(self, what: str, *values: Any, **more: Any) -> None:
        try:
            getattr(self.tracker, what)(*values, **more)
        except Exception as error:
            self.broken = True
            print(f"the tracker {self.name} failed, the training goes on without: {_said(error)}", file=sys.stderr)


def _find(name: str) -> Any:
    try:
        from accelerate import tracking
    except ImportError as error:
        raise CodefendError("trackers need accelerate; install it with `pip install accelerate`") from error
    known = tracking.LOGGER_TYPE_TO_CLASS  # those registered with `register_tracker_class`, too
    if name not in known:
        raise CodefendError(f"unknown tracker {name!r}; known: {', '.join(sorted(known))}")
    if name in tracking.LoggerType.list() and name not in map(str, tracking.get_available_trackers()):
        raise CodefendError(f"the tracker {name} is not installed; install it with `pip install {name}`")
    return known[name]


def _said(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
