"""The grid, cell by cell and batch by batch: rows that are on disk are skipped, so that the same command resumes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, wait
from dataclasses import dataclass, field
from pathlib import Path

from codefend.bench.config import AdaptiveOptions, AttackChoice, EvalConfig, check
from codefend.bench.craft import options_apply
from codefend.bench.judge import CleanRows, Work, batch_rows, clean_key, fill, is_complete
from codefend.bench.results import BARE, CLEAN, Cell, source_cell
from codefend.bench.reuse import check_donor
from codefend.bench.setup import Bench, Loaders, check_unchanged, open_bench
from codefend.core.processes import KILLED, StartPool, worker_pool
from codefend.core.progress import progress
from codefend.core.runs import Row, Run, check_run, open_run
from codefend.types import CodefendError


def run_grid(
    config: EvalConfig,
    run_dir: str | Path,
    loaders: Loaders | None = None,
    *,
    donor: Path | None = None,
    workers: int = 1,
    pool: StartPool | None = None,
) -> list[Row]:
    """Fill the run folder with every row that it lacks and return them all; see ``evaluate``.

    ``donor`` is another run whose attacked images may be reused, ``config.attacked`` by default. ``pool`` starts the
    workers.
    """
    check(config)
    donor = donor or (Path(config.attacked) if config.attacked else None)
    if donor is not None:
        check_donor(config, Path(run_dir), donor)
    check_run(run_dir, config.recorded())
    bench = open_bench(config, loaders)
    work = [(cell, batch, indices) for cell in grid(bench) for batch, indices in enumerate(batches(bench, cell))]
    total = sum(len(indices) for _, _, indices in work)
    with open_run(run_dir, config.recorded()) as run:
        write_description(bench, run, total)
        rows = run.rows()
        clean: CleanRows = {clean_key(row): row for row in rows if row["attack"] == CLEAN}
        with progress("evaluate", total, done=len(rows)) as advance:
            if workers > 1 or pool is not None:
                ParallelGrid(bench, run, clean, donor, workers, loaders, pool or worker_pool, advance).fill(work)
            else:
                for item in work:
                    advance(fill(bench, run, item, clean, donor), f"{item[0].defense} {item[0].attack}")
        return run.rows()


def grid(bench: Bench) -> Iterator[Cell]:
    """The cells that tell something, clean ones first, since every attacked row refers to a clean one."""
    config = bench.config
    for task in bench.tasks:
        for defense in config.defenses:
            yield Cell(task, CLEAN, 0.0, "clean", defense)
    for task in bench.tasks:
        for attack, choice in bench.attacks.items():
            for eps in config.eps if choice.spec.bound == "ball" else (0.0,):
                for threat in _threats(config):
                    for defense in config.defenses:
                        if _threatens(config, threat, defense) and _adapts(bench, choice, threat, defense):
                            yield Cell(task, attack, eps, threat, defense)


def _threats(config: EvalConfig) -> list[str]:
    """T0 first, always if there are undefended rows; images made on another victim are T1."""
    if config.craft_victim:
        return ["T1"]
    bare = ["T0"] if BARE in config.defenses else []
    return list(dict.fromkeys([*bare, *sorted(config.threats)]))


def _threatens(config: EvalConfig, threat: str, defense: str) -> bool:
    """Whether the config has this threat for this defense."""
    if config.craft_victim:
        return True
    if defense == BARE:
        return threat == "T0"
    if threat == "T1" and defense == config.surrogate:  # that is T2
        return False
    attacked = not config.adaptive or defense in config.adaptive
    return threat in config.threats and (attacked or threat in ("T0", "T1"))


def _adapts(bench: Bench, choice: AttackChoice, threat: str, defense: str) -> bool:
    """Whether the attack differs from others: adaptive options have no effect on oblivious attacks and on some
    defenses, and for a deterministic defense T2d equals T2.
    """
    evaluated = bench.defenses[defense]
    if threat not in ("T2", "T2d"):
        return choice.adaptive == AdaptiveOptions()
    return options_apply(bench, evaluated, choice.adaptive) and (threat != "T2d" or evaluated.randomized)


def batches(bench: Bench, cell: Cell) -> list[list[int]]:
    """Example indices of a cell's batches, in order."""
    config = bench.config
    limit = config.adaptive_limit if cell.threat in ("T2", "T2d") else None
    return bench.tasks[cell.task].batches(config.batch, limit)


def write_description(bench: Bench, run: Run, total: int) -> None:
    """Write ``bench.json`` once, with its costs. Raises CodefendError for weights or policies that changed since."""
    path = run.dir / "bench.json"
    if not path.exists():
        run.write("bench.json", json.dumps({**bench.describe(), "rows": total}, indent=2) + "\n")
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    check_unchanged(run.dir, before.get("prompts", {}), bench.prompts(), what="prompt policy")
    check_unchanged(run.dir, before.get("weights", {}), bench.weights())


# --- several processes ------------------------------------------------------------------------------------------------

_bench: list[Bench] = []  # of this process


def _start(config: EvalConfig, loaders: Loaders | None) -> None:
    _bench.append(open_bench(config, loaders))


def _rows(folder: Path, work: Work, before: list[Row], donor: Path | None) -> list[Row]:
    return batch_rows(_bench[0], folder, work, before, donor)


@dataclass
class ParallelGrid:
    """Fills ``run`` with ``workers`` processes, each with victims and defenses of its own.

    Batches are made in any order that the rows allow, and appended in the grid's order. Rows are the same as those of
    one process with as many threads. A batch of attacked images is made by one process at a time; the defenses that are
    judged on it wait for that one and read its file.
    """

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
