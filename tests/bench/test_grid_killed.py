"""A run that is killed, wherever it happens to be, resumes to the same rows."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import evaluate_kit
import toys
from codefend.core import runs
from codefend.core.runs import Row
from codefend.types import CodefendError
from evaluate_kit import SMALL, run, untimed


class Killed(BaseException):
    """What no code under test may catch."""


class Mortal(toys.ToyVictim):
    """Dies at its n-th answer."""

    def __init__(self, lives: int) -> None:
        super().__init__()
        self.lives = lives

    def generate(self, images: Tensor, prompts: Any) -> list[str]:
        if self.calls == self.lives:
            raise Killed
        return super().generate(images, prompts)


def test_killed_run_resumes_to_the_same_rows(tmp_path: Path) -> None:
    config = replace(SMALL, defenses=("none", "leaky", "jitter"), eot=2, resubmissions=2)
    whole = untimed(run(tmp_path / "whole", config))
    deaths = 0
    for lives in (2, 5, 9, 4):
        with pytest.raises(Killed):
            run(tmp_path / "cut", config, Mortal(lives))
        deaths += 1
    assert deaths == 4
    assert untimed(run(tmp_path / "cut", config)) == whole


def test_rows_lost_inside_a_batch_come_back_the_same(tmp_path: Path, grid: list[Row]) -> None:
    run(tmp_path)
    path = tmp_path / "rows.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:78]) + lines[78][:40])  # the middle of a batch, a torn line
    assert untimed(run(tmp_path)) == untimed(grid)
    assert run(tmp_path, victim=Mortal(0)) == runs.read_rows(path)  # complete: the victim isn't asked again


KILLED_AT_RANDOM = """
import os, random, signal, sys, time
sys.path.insert(0, sys.argv[1])
import torch._dynamo, torch.utils.flop_counter  # children inherit what is slow to import
import codefend.bench.grid, codefend.attacks.apgd
import evaluate_kit as t

class Telling(t.toys.ToyVictim):
    def generate(self, images, prompts):
        os.write(tell, b"!")
        return super().generate(images, prompts)

wait, kills, sizes = random.Random(int(sys.argv[3])), 0, set()
rows = t.Path(sys.argv[2], "rows.jsonl")
while True:
    hear, tell = os.pipe()
    child = os.fork()
    if child == 0:
        t.run(rows.parent, victim=Telling())
        os._exit(0)
    os.close(tell)
    os.read(hear, 1)  # the first question, or the end
    time.sleep(wait.uniform(0.0, 0.01 * (1 + kills)))  # early deaths on a fast machine, an end on a slow one
    os.kill(child, signal.SIGKILL)
    if os.waitpid(child, 0)[1] != signal.SIGKILL:  # it was done before
        break
    kills += 1
    sizes.add(rows.stat().st_size)
    os.close(hear)
print(kills, len(sizes))
"""


def test_kills_at_random_moments_lose_and_repeat_no_row(tmp_path: Path, grid: list[Row]) -> None:
    """The process dies wherever it happens to be: between grid, within a file, in an attack."""
    command = [sys.executable, "-c", KILLED_AT_RANDOM, str(Path(evaluate_kit.__file__).parent), str(tmp_path)]
    process = subprocess.run([*command, "2"], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    kills, moments = map(int, process.stdout.split())
    assert kills >= 3
    assert moments >= 3  # some of them with part of the grid on disk
    assert untimed(run(tmp_path)) == untimed(grid)


def test_another_config_is_refused(tmp_path: Path) -> None:
    run(tmp_path, replace(SMALL, limit=2, threats=("T0",)))
    with pytest.raises(CodefendError, match="steps was 12, now 13"):
        run(tmp_path, replace(SMALL, limit=2, threats=("T0",), steps=13))
