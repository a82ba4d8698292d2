"""Progress of long work on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(label: str, total: int, *, done: int = 0, every: float = 30.0) -> Iterator[Callable[..., None]]:
    """Show progress over ``total`` steps on standard error; yields ``advance(steps=1, note="")``.

    A bar on a terminal; elsewhere one line every ``every`` seconds.
    """
    if not sys.stderr.isatty():
        yield _plain_progress(label, total, done, every)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=total, completed=done, note="")

        def advance(steps: int = 1, note: str = "") -> None:
            bar.update(task, advance=steps, note=note)

        yield advance


def _plain_progress(label: str, total: int, done: int, every: float) -> Callable[..., None]:
    start = last = time.monotonic()
    first = done

    def advance(steps: int = 1, note: str = "") -> None:
        nonlocal done, last
        done += steps
        now = time.monotonic()
        if now - last >= every:
            last = now
            left = (now - start) / max(done - first, 1) * (total - done)
            print(f"{label}: {done}/{total}, about {left:.0f} s left  {note}".rstrip(), file=sys.stderr, flush=True)

    return advance
