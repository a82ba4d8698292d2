"""The grid in several processes: batches are made in any order that the rows allow, and appended in the grid's order.

Rows are the same as those of one process with as many threads. A batch of attacked images is made by one process at a
time; the defenses that are judged on it wait for that one and read its file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, wait
from dataclasses import dataclass, field
from pathlib import Path

from codefend.bench.cells import source_cell
from codefend.bench.config import EvalConfig
from codefend.bench.judge import CleanRows, Work, batch_rows, clean_key, is_complete
from codefend.bench.results import CLEAN
from codefend.bench.setup import Bench, Loaders, open_bench
from codefend.core.processes import KILLED, StartPool
from codefend.core.runs import Row, Run
from codefend.types import CodefendError

_bench: list[Bench] = []  # of this process


def _start(config: EvalConfig, loaders: Loaders | None) -> None:
    _bench.append(open_bench(config, loaders))


def _rows(folder: Path, work: Work, before: list[Row], donor: Path | None) -> list[Row]:
    return batch_rows(_bench[0], folder, work, before, donor)


@dataclass
class ParallelGrid:
    """Fills ``run`` with ``workers`` processes, each with victims and defenses of its own."""

    bench: Bench
    run: Run
    clean: CleanRows
    donor: Path | None
    workers: int
    loaders: Loaders | None
    start_pool: StartPool
    advance: Callable[[int, str], None]
    running: dict[Future[list[Row]], int] = field(default_factory=dict)  # to the number of its work
    finished: dict[int, list[Row]] = field(default_factory=dict)  # rows that wait for those before them

    def fill(self, work: Sequence[Work]) -> None:
        """Do all work that the run lacks. Raises CodefendError when a process is killed; rows so far are saved."""
        todo = [item for item in work if not is_complete(self.bench, self.run, item)]
        waiting, appended = list(range(len(todo))), 0
        pool = self.start_pool(min(self.workers, max(1, len(todo))), _start, self.bench.config, self.loaders)
        try:
            while appended < len(todo):
                for number in list(waiting):
                    if len(self.running) == self.workers:
                        break
                    if self._may_start(todo, number):
                        waiting.remove(number)
                        self.running[pool.submit(_rows, *self._arguments(todo[number]))] = number
                self._collect()
                while (rows := self.finished.pop(appended, None)) is not None:
                    cell = todo[appended][0]
                    self.advance(sum(self.run.append(row) for row in rows), f"{cell.defense} {cell.attack}")
                    appended += 1
        except BrokenExecutor as error:
            raise CodefendError(KILLED) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _arguments(self, work: Work) -> tuple[Path, Work, list[Row], Path | None]:
        keys = [] if work[0].attack == CLEAN else self._clean_keys(work)
        return self.run.dir, work, [self.clean[key] for key in keys], self.donor

    def _clean_keys(self, work: Work) -> list[tuple[str, str, str]]:
        cell, _, indices = work
        return [(cell.task, cell.defense, self.bench.tasks[cell.task].ids[index]) for index in indices]

    def _may_start(self, todo: Sequence[Work], number: int) -> bool:
        cell, batch, _ = todo[number]
        if cell.attack == CLEAN:
            return True
        source = source_cell(self.bench.config, cell)
        crafting = [todo[other] for other in self.running.values()]
        if any((source_cell(self.bench.config, other[0]), other[1]) == (source, batch) for other in crafting):
            return False
        return all(key in self.clean for key in self._clean_keys(todo[number]))

    def _collect(self) -> None:
        for future in wait(self.running, return_when=FIRST_COMPLETED).done:
            number = self.running.pop(future)
            self.finished[number] = future.result()
            self.clean |= {clean_key(row): row for row in self.finished[number] if row["attack"] == CLEAN}
