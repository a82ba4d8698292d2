"""An evaluation in several processes has the rows of one process, each once."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

import toys
from codefend.bench import EvalConfig, evaluate
from codefend.bench.setup import Loaders
from codefend.core.runs import Row, read_rows
from codefend.types import CodefendError, Victim
from evaluate_kit import SMALL, untimed

CONFIG = replace(SMALL, steps=2, limit=6, batch=3, eot=1)


def toy_victim(name: str) -> Victim:
    return toys.ToyVictim()


def victim_killed_once(name: str) -> Victim:
    """Kills the worker process that loads it, once."""
    marker = Path(os.environ["CODEFEND_TEST_MARKER"])
    if not marker.exists() and os.getpid() != int(os.environ["CODEFEND_TEST_PARENT"]):
        marker.write_text("")
        os.kill(os.getpid(), signal.SIGKILL)
    return toys.ToyVictim()


def run(folder: Path, config: EvalConfig = CONFIG, *, workers: int, victim: object = toy_victim) -> list[Row]:
    loaders = Loaders(victim=victim, task=toys.task, purifier=toys.purifier)  # type: ignore[arg-type]
    return evaluate(config, folder, loaders=loaders, workers=workers)


@pytest.mark.parametrize("killed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_processes_write_the_rows_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: bool) -> None:
    monkeypatch.setenv("CODEFEND_TEST_MARKER", str(tmp_path / "marker"))
    monkeypatch.setenv("CODEFEND_TEST_PARENT", str(os.getpid()))
    whole = untimed(run(tmp_path / "one", workers=1))
    if killed:
        with pytest.raises(CodefendError, match="a worker process was killed"):
            run(tmp_path / "two", workers=2, victim=victim_killed_once)
    assert untimed(run(tmp_path / "two", workers=2)) == whole
    assert len({row["key"] for row in read_rows(tmp_path / "two")}) == len(whole)
