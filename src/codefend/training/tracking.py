"""Send a training's rows to an experiment tracker of `accelerate`.

The run folder remains the record: the tracker receives a row after it is on disk, a resumed training sends new rows
only, and after an error of the tracker the training continues without it. It is not part of the recorded config.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from codefend.core.runs import Run, listening
from codefend.types import CodefendError

PROJECT = "codefend"
NAME_ARGUMENTS = {"wandb": "name", "mlflow": "run_name", "trackio": "name"}  # of the run, by tracker


@contextmanager
def tracked(name: str) -> Iterator[None]:
    """Inside the block, send the row of every training step to tracker ``name``; "" is none.

    Raises CodefendError when it is unknown, not installed, or cannot start.
    """
    if not name:
        yield
        return
    listener = TrackerListener(name)
    try:
        with listening(listener.log):
            yield
    finally:
        listener.finish()


class TrackerListener:
    """Sends the rows of a run to a tracker, which is opened with the first, in the only process that writes any."""

    def __init__(self, name: str) -> None:
        """Raises CodefendError when the tracker is unknown or not installed."""
        self.name, self.kind = name, _tracker_class(name)
        self.tracker: Any = None
        self.broken = False

    def log(self, run: Run, row: Mapping[str, Any]) -> None:
        """Send a row that has a step."""
        if self.broken or "step" not in row:
            return
        if self.tracker is None:
            self.tracker = self._open(run)
        numbers = {key: float(value) for key, value in row.items() if isinstance(value, int | float) and key != "step"}
        self._try("log", numbers, step=row["step"])

    def finish(self) -> None:
        """Close the tracker."""
        if self.tracker is not None and not self.broken:
            self._try("finish")

    def _open(self, run: Run) -> Any:
        arguments = {NAME_ARGUMENTS[self.name]: run.dir.resolve().name} if self.name in NAME_ARGUMENTS else {}
        settings = {key: value if isinstance(value, int | float) else str(value) for key, value in run.config.items()}
        try:
            # A tracker that writes files does so in a folder of its name inside the run folder.
            local = self.kind.requires_logging_directory
            tracker = self.kind(self.name, run.dir) if local else self.kind(PROJECT, **arguments)
            tracker.start()
            tracker.store_init_configuration(settings)
        except Exception as error:  # each tracker raises its own errors
            raise CodefendError(f"the tracker {self.name} cannot start: {_first_line(error)}") from error
        return tracker

    def _try(self, method: str, *arguments: Any, **options: Any) -> None:
        try:
            getattr(self.tracker, method)(*arguments, **options)
        except Exception as error:  # each tracker raises its own errors
            self.broken = True
            message = f"the tracker {self.name} failed, the training continues without it: {_first_line(error)}"
            print(message, file=sys.stderr)


def _tracker_class(name: str) -> Any:
    try:
        from accelerate import tracking
    except ImportError as error:
        raise CodefendError("trackers need accelerate; install it with `pip install accelerate`") from error
    known = tracking.LOGGER_TYPE_TO_CLASS  # also those of `register_tracker_class`
    if name not in known:
        raise CodefendError(f"unknown tracker {name!r}; known: {', '.join(sorted(known))}")
    if name in tracking.LoggerType.list() and name not in map(str, tracking.get_available_trackers()):
        raise CodefendError(f"the tracker {name} is not installed; install it with `pip install {name}`")
    return known[name]


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
