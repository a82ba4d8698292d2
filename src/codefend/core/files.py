"""A file is there whole or not at all, whoever is killed while it is written and whoever else writes it."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

from codefend.types import CodefendError

if sys.platform != "win32":
    import fcntl


def write_atomic(path: str | Path, content: bytes | str | Callable[[IO[bytes]], object]) -> None:
    """Write a file whole or not at all: into a neighbour first, flushed to disk, then renamed over ``path``.

    ``content`` is bytes, text, or a function that writes to an open binary file. Missing folders are made.
    Raises CodefendError when the place cannot be written (no permission, disk full, a folder of that name).
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part, stream = _open_part(path)
        try:
            if callable(content):
                content(stream)
            else:
                stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
            _let_go(stream)
            part.replace(path)
        except BaseException:
            _let_go(stream)
            with suppress(OSError):
                part.unlink()
            raise
        finally:
            stream.close()
    except OSError as error:
        raise CodefendError(f"cannot write {path}: {error.strerror or error}") from error


def _open_part(path: Path) -> tuple[Path, IO[bytes]]:
    """An empty hidden neighbour that no other writer has, held until it is closed.

    Its name is fixed, so what a killed process left is soon reused; while another writes there, it is the thread's own.
    """
    part = path.with_name(f".{path.name[:60]}.part")  # at most 240 bytes and what is added: a name may have 255
    stream = _hold(part)
    if stream is not None:
        return part, stream
    own = part.with_suffix(f".{threading.get_native_id()}.part")
    return own, own.open("wb")


def _hold(part: Path) -> IO[bytes] | None:
    """The file, emptied and locked; None where another writer has it, or it cannot be had."""
    if sys.platform == "win32":  # no such lock there
        return None
    try:
        stream = os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT, 0o666), "wb")
    except OSError:
        return None
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(stream.fileno()), part.stat()):  # else its writer has just put it in place
            stream.truncate(0)
            return stream
    except OSError:
        pass
    stream.close()
    return None


def _let_go(stream: IO[bytes]) -> None:
    """Windows renames and removes no open file. Elsewhere it stays locked until it has its name."""
    if sys.platform == "win32":
        stream.close()
