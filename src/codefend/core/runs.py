"""Run folders that survive kills.

A run folder holds ``config.json`` (the settings), ``environment.jsonl`` (the machines it ran on) and ``rows.jsonl``
(the results, one line each). Rerun the command to resume.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import IO, Any

from codefend.core.files import write_atomic
from codefend.types import CodefendError

if sys.platform != "win32":
    import fcntl

Row = dict[str, Any]
_listeners: list[Callable[[Run, Mapping[str, Any]], None]] = []


def plain(value: Any) -> Any:
    """Reduce dataclasses, mappings, sequences and paths to what JSON holds; nan and infinities become None."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(plain(item) for item in value)
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # numpy and torch scalars and arrays
        return plain(value.tolist())
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


# --- the run folder --------------------------------------------------------------------------------------------------


class Run:
    """An open run folder, locked against other processes until it is closed. Create one with ``open_run``."""

    def __init__(self, folder: Path, config: Mapping[str, Any], *, resume: bool = True) -> None:
        self.dir, self.config = folder, dict(config)
        self._path = folder / "rows.jsonl"
        self._guard = self._fd = -1
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._guard = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
            self._lock()
            self._settle(resume)
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            self._keys = self._repair()
        except BaseException:
            self.close()
            raise

    def rows(self) -> list[Row]:
        """All complete rows so far, oldest first."""
        return read_rows(self._path)

    def has(self, key: str) -> bool:
        return key in self._keys

    def append(self, row: Mapping[str, Any]) -> bool:
        """Append one row and flush it to disk; returns False, without writing, when its ``"key"`` exists already.

        Rows without a ``"key"`` are always appended. nan and infinities are written as null: not scored.
        """
        key = row.get("key")
        if key in self._keys:
            return False
        line = (json.dumps(plain(row), ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8", "surrogatepass")
        size = os.fstat(self._fd).st_size
        try:
            if os.write(self._fd, line) != len(line):
                raise OSError("disk full")
            os.fsync(self._fd)
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._fd, size)
            raise CodefendError(f"cannot write {self._path}: {error.strerror or error}") from error
        if key is not None:
            self._keys.add(key)
        for listener in _listeners:
            listener(self, row)
        return True

    def write(self, name: str, content: bytes | str | Callable[[IO[bytes]], object]) -> Path:
        """Write a file into the run folder atomically and return its path."""
        write_atomic(self.dir / name, content)
        return self.dir / name

    def close(self) -> None:
        for descriptor in (self._fd, self._guard):
            if descriptor >= 0:
                os.close(descriptor)
        self._fd = self._guard = -1

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_guard"):
            self.close()

    def _lock(self) -> None:
        if sys.platform == "win32":  # no lockf on Windows
            return
        # The lock belongs to the process, so that an interactive session can reopen its own folder. It is on a file of
        # its own, because it is lost as soon as the process closes any other descriptor of the same file.
        try:
            fcntl.lockf(self._guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CodefendError(f"another process uses {self.dir}; wait for it or choose another folder") from error

    def _settle(self, resume: bool) -> None:
        """Write a new run's config; checked under the lock, since another process may just have written one."""
        check_run(self.dir, self.config, resume=resume)
        saved = self.dir / "config.json"
        if not saved.exists():
            write_atomic(saved, json.dumps(self.config, indent=2, ensure_ascii=False) + "\n")

    def _repair(self) -> set[Any]:
        """Truncate the line that a kill left incomplete; return the keys of the remaining rows."""
        data = self._path.read_bytes()
        end = data.rfind(b"\n") + 1
        last = data.rfind(b"\n", 0, max(end - 1, 0)) + 1
        if end and _parse(data[last:end]) is None:  # a power cut can leave zeros before the newline
            end = last
        if end < len(data):
            os.ftruncate(self._fd, end)
        return {row["key"] for row in self.rows() if "key" in row}


@contextmanager
def listening(listener: Callable[[Run, Mapping[str, Any]], None]) -> Iterator[None]:
    """Inside the block, call ``listener(run, row)`` after every new row."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def check_run(folder: str | Path, config: Any, *, resume: bool = True) -> None:
    """Raise CodefendError where ``open_run`` would, without creating anything; call it before models are loaded."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise CodefendError(f"{folder} is a file; choose a folder")
    if (folder / "config.json").exists():
        if not resume:
            raise CodefendError(f"{folder} already holds a run; choose another folder")
        _check_config(folder, read_config(folder), plain(config))
    elif (folder / "rows.jsonl").exists():
        raise CodefendError(f"{folder} holds results without a config.json; choose another folder")


def open_run(folder: str | Path, config: Any, *, resume: bool = True) -> Run:
    """Start a run in ``folder`` or resume the one there. ``config`` is a mapping or a dataclass.

    Raises CodefendError when the folder holds a run with another config (the differing keys are named), when it holds
    any run and ``resume`` is false, and when it cannot be written.
    """
    check_run(folder, config, resume=resume)
    folder = Path(folder)
    try:
        run = Run(folder, plain(config), resume=resume)
    except OSError as error:
        raise CodefendError(f"cannot use {folder}: {error.strerror or error}") from error
    _note_environment(folder / "environment.jsonl")
    return run


def read_rows(path: str | Path) -> list[Row]:
    """Read the rows of a run folder or a ``rows.jsonl``; an incomplete last line is skipped. The file is not changed.

    Raises CodefendError for a missing file or a damaged line.
    """
    path = Path(path)
    path = path / "rows.jsonl" if path.is_dir() else path
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise CodefendError(f"cannot read {path}: {error.strerror or error}") from error
    rows = []
    for number, line in enumerate(lines[:-1], 1):  # after the last newline: empty or incomplete
        row = _parse(line)
        if row is not None:
            rows.append(row)
        elif number < len(lines) - 1:
            raise CodefendError(f"{path}: line {number} is damaged; remove it to resume without that result")
    return rows


def read_config(folder: str | Path) -> Row:
    """Read a run folder's ``config.json``. Raises CodefendError when it is missing or damaged."""
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except OSError as error:
        raise CodefendError(f"{folder} is not a run folder: cannot read config.json ({error.strerror})") from error
    except ValueError as error:
        raise CodefendError(f"{path} is damaged ({error}); choose another folder") from error
    if not isinstance(config, dict):
        raise CodefendError(f"{path} is damaged (no object); choose another folder")
    return config


def _parse(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _check_config(folder: Path, saved: Row, config: Row) -> None:
    old, new = _flat(saved), _flat(config)
    missing = "(unset)"
    keys = [key for key in sorted(old | new) if old.get(key, missing) != new.get(key, missing)]
    if keys:
        changes = [f"{key} was {old.get(key, missing)!r}, now {new.get(key, missing)!r}" for key in keys[:5]]
        more = f", and {len(keys) - 5} more" if len(keys) > 5 else ""
        raise CodefendError(
            f"{folder} holds a run with another config: {'; '.join(changes)}{more}. "
            "Use the same settings to resume it, or choose another folder"
        )


def _flat(config: Mapping[str, Any], prefix: str = "") -> Row:
    flat: Row = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


# --- provenance ------------------------------------------------------------------------------------------------------


def environment() -> Row:
    """Versions, processor and threads, on which a result depends besides its config. No names of users or machines."""
    versions: Row = {}
    for package in ("codefend", "torch", "numpy", "pillow", "safetensors", "transformers", "gguf"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    system = f"{platform.system()} {platform.machine()}"
    cpu: Row = {"cpu": _cpu(), "cores": os.cpu_count(), "threads": None}
    if "torch" in sys.modules:
        from codefend.core.devices import default_device, precision

        cpu |= {"threads": sys.modules["torch"].get_num_threads(), "precision": precision(default_device())}
    return {"python": platform.python_version(), "system": system, **cpu, "versions": versions}


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _note_environment(path: Path) -> None:
    """Append this machine's environment unless it equals the last one."""
    now = plain(environment())
    before = path.read_text().splitlines() if path.exists() else []
    if not before or _parse(before[-1].encode()) != now:
        write_atomic(path, "\n".join([*before, json.dumps(now)]) + "\n")
