"""Units in worker processes on this machine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice

from codefend.core.processes import keep_freed_memory, worker_pool
from codefend.purifiers.corpus.job import Engine, Tick, UnitPurifier, UnitReport
from codefend.purifiers.corpus.units import Unit
from codefend.types import CodefendError

_BREAKS = 3  # times in a row that processes may end before a unit is finished


def in_processes(workers: int) -> Engine:
    """The engine of ``workers`` processes. One that is killed is replaced, and its unit done again."""

    def engine(purify: UnitPurifier, units: Iterable[Unit], tick: Tick) -> Iterator[UnitReport]:
        source, unfinished, breaks = iter(units), list[Unit](), 0
        while True:
            pool, running = worker_pool(workers, keep_freed_memory), dict[Unit, Future[UnitReport]]()
            try:
                while True:
                    unfinished += islice(source, 2 * workers - len(unfinished))
                    if not unfinished:
                        return
                    running |= {unit: pool.submit(purify, unit) for unit in unfinished if unit not in running}
                    wait(running.values(), return_when=FIRST_COMPLETED)
                    for unit in [unit for unit in unfinished if running[unit].done()]:
                        report = running.pop(unit).result()
                        unfinished.remove(unit)
                        breaks = 0
                        yield report
            except BrokenProcessPool as error:
                breaks += 1
                if breaks == _BREAKS:
                    raise CodefendError(
                        "worker processes were killed again and again, perhaps for lack of memory; "
                        "use fewer --workers, then rerun the command to resume"
                    ) from error
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    return engine
