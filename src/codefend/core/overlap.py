"""Read the next item and write the last one in a second thread, while this one computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Item = TypeVar("Item")
Read = TypeVar("Read")
Made = TypeVar("Made")
Done = TypeVar("Done")
T = TypeVar("T")
R = TypeVar("R")


class Overlap(Generic[Item, Read, Made, Done]):
    """``write(compute(read(item)))`` of item after item, in order; only ``compute`` runs in this thread.

    At most three items are held: one that is read ahead, the present one, and one that is written behind. Use it as a
    context manager, which ends the thread. The exception of a function is raised where its result would be returned.

    >>> with Overlap(int, lambda number: 2 * number, str) as overlap:
    ...     list(overlap.run(["1", "2", "3"]))
    ['2', '4', '6']
    """

    def __init__(
        self,
        read: Callable[[Item], Read],
        compute: Callable[[Read], Made],
        write: Callable[[Made], Done],
        *,
        small: Callable[[Item], bool] = lambda item: False,
    ) -> None:
        """Items that are ``small`` stay in this thread: threads that take turns every few microseconds lose time."""
        self._read, self._compute, self._write, self._small = read, compute, write, small
        self._reading, self._writing = deque[tuple[bool, Future[Read]]](), deque[Future[Done]]()
        self._thread = ThreadPoolExecutor(1, "codefend-files")
        _compute_on_one_core(self._thread)

    def run(self, items: Iterable[Item]) -> Iterator[Done]:
        """The results of all ``items``, each at the latest two items later."""
        try:
            for item in items:
                yield from self.push(item)
            yield from self.drain()
        except (Exception, KeyboardInterrupt):  # what was computed before it is not lost
            yield from self._written(behind=0)
            raise

    def push(self, item: Item) -> list[Done]:
        """Start on ``item``, compute the one before, and return what is ready of the earlier ones."""
        small = self._small(item)
        self._reading.append((small, self._start(small, self._read, item)))
        return self._advance(behind=1)

    def drain(self) -> list[Done]:
        """Finish all items."""
        return self._advance(behind=0)

    def _advance(self, behind: int) -> list[Done]:
        while len(self._reading) > behind:
            small, read = self._reading.popleft()
            made = self._compute(read.result())
            self._writing.append(self._start(small, self._write, made))
        return list(self._written(behind))

    def _written(self, behind: int) -> Iterator[Done]:
        while len(self._writing) > behind:
            yield self._writing.popleft().result()

    def _start(self, here: bool, function: Callable[[T], R], argument: T) -> Future[R]:
        if not here:
            return self._thread.submit(function, argument)
        done = Future[R]()
        done.set_result(function(argument))
        return done

    def __enter__(self) -> Overlap[Item, Read, Made, Done]:
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)


def _compute_on_one_core(thread: ThreadPoolExecutor) -> None:
    """Tensors there get no threads of their own, which would take the cores from this thread's."""
    import torch

    threads = torch.get_num_threads()
    thread.submit(torch.get_num_threads).result()  # a thread's first call takes over the number of all
    thread.submit(torch.set_num_threads, 1).result()
    torch.set_num_threads(threads)  # for threads to come, which the call above changed as well
