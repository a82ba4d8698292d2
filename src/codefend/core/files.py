"""Atomic file writes, safe against kills and against other writers of the same file."""

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
    """Write a file atomically: into a temporary neighbour, flushed to disk, then renamed to ``path``.

    ``content`` is bytes, text, or a function that writes to an open binary file. Missing folders are created.
    Raises CodefendError when the path cannot be written (no permission, disk full, a folder of that name).
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
            _close_on_windows(stream)
            part.replace(path)
        except BaseException:
            _close_on_windows(stream)
            with suppress(OSError):
                part.unlink()
            raise
        finally:
            stream.close()
    except OSError as error:
        raise CodefendError(f"cannot write {path}: {error.strerror or error}") from error


def _open_part(path: Path) -> tuple[Path, IO[bytes]]:
    """An empty hidden neighbour of ``path``, locked against other writers until it is closed.

    Its name is fixed, so that the leftover of a killed process is reused; while another writer holds it, the name
    is that of the thread.
    """
    part = path.with_name(f".{path.name[:60]}.part")  # at most 240 bytes plus the suffix: a name may have 255
    stream = _hold(part)
    if stream is not None:
        return part, stream
    own = part.with_suffix(f".{threading.get_native_id()}.part")
    return own, own.open("wb")


def _hold(part: Path) -> IO[bytes] | None:
    """The file, emptied and locked; None when another writer holds it or it cannot be opened."""
    if sys.platform == "win32":  # no flock on Windows
        return None
    try:
        stream = os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT, 0o666), "wb")
    except OSError:
        return None
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(stream.fileno()), part.stat()):  # else its writer has just renamed it
            stream.truncate(0)
            return stream
    except OSError:
        pass
    stream.close()
    return None


def _close_on_windows(stream: IO[bytes]) -> None:
    """Windows cannot rename or remove an open file. Elsewhere the file stays locked until it is renamed."""
    if sys.platform == "win32":
        stream.close()
