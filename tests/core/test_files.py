"""Atomic file writes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from codefend.core import files
from codefend.core.files import write_atomic
from codefend.types import CodefendError

SRC = str(Path(files.__file__).parents[2])


def test_write_atomic_replaces_files_and_creates_folders(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "file.bin"
    write_atomic(path, b"one")
    write_atomic(path, "zwei")
    assert path.read_text() == "zwei"
    write_atomic(path, lambda stream: stream.write(b"three"))
    assert path.read_bytes() == b"three"
    assert [entry.name for entry in path.parent.iterdir()] == ["file.bin"]


def test_write_atomic_keeps_the_old_file_when_the_writer_fails(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    write_atomic(path, b"old")

    def half_then_stop(stream: Any) -> None:
        stream.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, half_then_stop)
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.bin"]


def test_of_two_writers_the_last_one_wins(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"

    def interrupted(stream: Any) -> None:
        stream.write(b"first ")
        write_atomic(path, b"second")
        assert path.read_bytes() == b"second"
        stream.write(b"to the end")

    write_atomic(path, interrupted)
    assert path.read_bytes() == b"first to the end"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.bin"]


def test_the_temporary_file_of_a_killed_writer_is_reused(tmp_path: Path) -> None:
    script = f"""
import os, signal, sys; sys.path.insert(0, {SRC!r})
from codefend.core.files import write_atomic
def half(stream):
    stream.write(b"half of something long")
    stream.flush()
    os.kill(os.getpid(), signal.SIGKILL)
write_atomic({str(tmp_path / "file.bin")!r}, half)
"""
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", script]).returncode < 0
    assert [entry.stat().st_size for entry in tmp_path.iterdir()] == [22]  # two killed, one left
    write_atomic(tmp_path / "file.bin", b"short")
    assert [(entry.name, entry.read_bytes()) for entry in tmp_path.iterdir()] == [("file.bin", b"short")]
    write_atomic(tmp_path / ("\u5199" * 83 + ".bin"), b"x")  # 253 bytes, of 255 that a name may have


def test_write_atomic_names_the_obstacle(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for place in (tmp_path / "file" / "below", tmp_path / "folder"):
        with pytest.raises(CodefendError, match="cannot write"):
            write_atomic(place, b"x")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "folder"]
