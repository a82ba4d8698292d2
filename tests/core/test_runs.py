"""Run folders after a kill: complete rows and files, the same seeds, and one config per folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from codefend.core import runs
from codefend.types import CodefendError

SRC = str(Path(runs.__file__).parents[2])


@dataclass(frozen=True)
class Inner:
    width: int = 8


@dataclass(frozen=True)
class Config:
    seed: int = 0
    eps: float = 8 / 255
    model: Inner = Inner()
    sizes: tuple[int, ...] = (1, 2)


# --- rows ------------------------------------------------------------------------------------------------------------


def test_rows_are_keyed_and_survive_reopening(tmp_path: Path) -> None:
    with runs.open_run(tmp_path / "run", Config()) as run:
        assert run.append({"key": "a", "score": 1.5})
        assert not run.append({"key": "a", "score": 9})
        assert run.append({"loss": 0.5})
        assert run.append({"loss": 0.5})  # rows without a key are never duplicates
    with runs.open_run(tmp_path / "run", Config()) as again:
        assert again.has("a")
        assert not again.has("b")
        assert not again.append({"key": "a"})
        assert again.rows() == [{"key": "a", "score": 1.5}, {"loss": 0.5}, {"loss": 0.5}]
    assert runs.read_rows(tmp_path / "run") == again.rows()


def test_nan_and_infinity_become_null(tmp_path: Path) -> None:
    with runs.open_run(tmp_path, {}) as run:
        run.append({"key": "a", "score": float("nan"), "pair": (torch.tensor(2.0), float("inf")), "at": Path("x")})
        assert run.rows() == [{"key": "a", "score": None, "pair": [2.0, None], "at": "x"}]
        with pytest.raises(TypeError, match="object"):
            run.append({"key": "b", "thing": object()})
        assert not run.has("b")


@settings(max_examples=15, deadline=None)
@given(cut=st.integers(0, 200))
def test_an_incomplete_last_row_is_dropped(cut: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("torn")
    rows = [{"key": f"k{i}", "text": "ü" * i} for i in range(6)]
    with runs.open_run(folder, {}) as run:
        for row in rows:
            run.append(row)
    path = folder / "rows.jsonl"
    data = path.read_bytes()[: max(0, len(path.read_bytes()) - cut)]
    path.write_bytes(data)
    whole = data.count(b"\n")
    assert runs.read_rows(folder) == rows[:whole]
    with runs.open_run(folder, {}) as run:
        assert run.rows() == rows[:whole]
        for row in rows:
            assert run.append(row) == (row not in rows[:whole])
        assert run.rows() == rows
    assert path.read_bytes().count(b"\n") == 6


def test_zeros_after_a_power_cut_are_dropped_but_damage_inside_is_reported(tmp_path: Path) -> None:
    with runs.open_run(tmp_path, {}) as run:
        run.append({"key": "a"})
    path = tmp_path / "rows.jsonl"
    good = path.read_bytes()
    path.write_bytes(good + b"\0" * 40 + b"\n")
    with runs.open_run(tmp_path, {}) as run:
        assert run.rows() == [{"key": "a"}]
    path.write_bytes(good + b"damaged\n" + good)
    with pytest.raises(CodefendError, match="line 2 is damaged"):
        runs.open_run(tmp_path, {})


def test_a_killed_process_loses_at_most_the_row_it_was_writing(tmp_path: Path) -> None:
    script = f"""
import sys; sys.path.insert(0, {SRC!r})
from codefend.core.runs import open_run
run = open_run({str(tmp_path)!r}, {{"n": 1}})
i = 0
while True:
    run.append({{"key": str(i), "pad": "x" * 3000}})
    i += 1
"""
    child = subprocess.Popen([sys.executable, "-c", script])
    rows = tmp_path / "rows.jsonl"
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and (not rows.exists() or rows.stat().st_size < 20_000):
        time.sleep(0.01)
    try:
        with pytest.raises(CodefendError, match="another process"):
            runs.open_run(tmp_path, {"n": 1})
    finally:
        child.kill()
        child.wait()
    with runs.open_run(tmp_path, {"n": 1}) as run:
        rows = run.rows()
    assert len(rows) >= 6
    assert [row["key"] for row in rows] == [str(i) for i in range(len(rows))]


def test_a_process_that_loses_the_race_for_a_folder_writes_nothing(tmp_path: Path) -> None:
    script = f"""
import fcntl, os
guard = os.open({str(tmp_path / ".lock")!r}, os.O_RDWR | os.O_CREAT)
fcntl.lockf(guard, fcntl.LOCK_EX)
print("held", flush=True)
input()
"""
    child = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin
    assert child.stdout
    try:
        assert child.stdout.readline() == "held\n"  # its config is still to come
        with pytest.raises(CodefendError, match="another process"):
            runs.open_run(tmp_path, {"n": 2})
        assert [entry.name for entry in tmp_path.iterdir()] == [".lock"]
    finally:
        child.communicate("")
    runs.open_run(tmp_path, {"n": 2}).close()
    assert runs.read_config(tmp_path) == {"n": 2}


@pytest.mark.parametrize("resume", [True, False])
def test_a_run_created_between_check_and_lock_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: bool
) -> None:
    lock = runs.Run._lock

    def come_and_gone(run: runs.Run) -> None:
        monkeypatch.setattr(runs.Run, "_lock", lock)
        runs.open_run(tmp_path, {"n": 1 if resume else 2}).close()
        lock(run)

    monkeypatch.setattr(runs.Run, "_lock", come_and_gone)
    with pytest.raises(CodefendError, match="n was 1, now 2" if resume else "already holds a run"):
        runs.open_run(tmp_path, {"n": 2}, resume=resume)
    assert runs.read_config(tmp_path) == {"n": 1 if resume else 2}


# --- configs ---------------------------------------------------------------------------------------------------------


def test_another_config_is_refused_and_the_keys_are_named(tmp_path: Path) -> None:
    runs.open_run(tmp_path, Config()).close()
    assert runs.read_config(tmp_path) == {"seed": 0, "eps": 8 / 255, "model": {"width": 8}, "sizes": [1, 2]}
    with pytest.raises(CodefendError, match=r"seed was 0, now 1; sizes was \[1, 2\], now \[3\]") as caught:
        runs.open_run(tmp_path, Config(seed=1, sizes=(3,)))
    assert "eps" not in str(caught.value)
    with pytest.raises(CodefendError, match=r"model\.width was 8, now 16"):
        runs.open_run(tmp_path, Config(model=Inner(16)))
    with pytest.raises(CodefendError, match="extra was '\\(unset\\)', now 1"):
        runs.open_run(tmp_path, {**runs.read_config(tmp_path), "extra": 1})
    runs.open_run(tmp_path, Config()).close()
    runs.check_run(tmp_path, Config())
    with pytest.raises(CodefendError, match="seed was 0, now 1"):
        runs.check_run(tmp_path, Config(seed=1))
    runs.check_run(tmp_path / "new", Config())
    assert not (tmp_path / "new").exists()


def test_unusable_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CodefendError, match="is a file"):
        runs.open_run(tmp_path / "file", {})
    (tmp_path / "rows.jsonl").write_text("")
    with pytest.raises(CodefendError, match=r"without a config\.json"):
        runs.open_run(tmp_path, {})
    runs.open_run(tmp_path / "run", {}).close()
    with pytest.raises(CodefendError, match="already holds a run"):
        runs.open_run(tmp_path / "run", {}, resume=False)
    (tmp_path / "run" / "config.json").write_text("{")
    with pytest.raises(CodefendError, match="damaged"):
        runs.open_run(tmp_path / "run", {})
    with pytest.raises(CodefendError, match="not a run folder"):
        runs.read_config(tmp_path / "nowhere")
    with pytest.raises(CodefendError, match="cannot read"):
        runs.read_rows(tmp_path / "nowhere")


def test_the_environment_is_recorded_once_without_machine_names(tmp_path: Path) -> None:
    for _ in range(2):
        runs.open_run(tmp_path, {}).close()
    (line,) = (tmp_path / "environment.jsonl").read_text().splitlines()
    noted = json.loads(line)
    assert (
        noted["versions"]["torch"] == torch.__version__.split("+")[0] or noted["versions"]["torch"] == torch.__version__
    )
    assert noted["threads"] == torch.get_num_threads()
    assert os.uname().nodename not in line
    assert str(Path.home()) + "/" not in line
