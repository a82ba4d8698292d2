"""A folder on any fsspec file system. Files appear whole or not at all; nothing is renamed or appended to."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import IO, Any

from codefend.core.files import write_atomic
from codefend.types import CodefendError


@dataclass(frozen=True)
class Entry:
    """A file: ``stamp`` changes when its content does."""

    path: str  # on its file system
    size: int  # bytes
    stamp: str


@dataclass(frozen=True)
class Store:
    """``url`` is a path or an fsspec URL, such as s3://bucket/folder. Every error is a CodefendError of one line."""

    url: str

    @cached_property
    def _place(self) -> tuple[Any, str]:
        from fsspec.core import url_to_fs

        try:
            fs, root = url_to_fs(self.url)
        except ImportError as error:
            raise CodefendError(f"{self.url}: {error}; install that package") from error
        except ValueError as error:
            raise CodefendError(f"{self.url}: {error}") from error
        return fs, str(root).rstrip("/") or "/"

    @property
    def fs(self) -> Any:
        return self._place[0]

    @property
    def root(self) -> str:
        return self._place[1]

    @property
    def is_local(self) -> bool:
        from fsspec.implementations.local import LocalFileSystem

        return isinstance(self.fs, LocalFileSystem)

    def path(self, name: str) -> str:
        """The path of ``name``, relative to the root, on the file system."""
        return f"{self.root.rstrip('/')}/{name}" if name else self.root

    def entry(self, path: str) -> Entry | None:
        """The file at a path; None for a folder. Raises CodefendError when there is neither."""
        with self._errors():
            if not self.fs.exists(path):
                unreachable = "" if self.is_local else ", or it cannot be reached"
                raise CodefendError(f"no such file or folder{unreachable}: {self.url}")
            info = self.fs.info(path)
        return None if info["type"] == "directory" else _entry(info)

    def children(self, folder: str) -> tuple[list[str], list[Entry]]:
        """Paths of the folders and entries of the files in a folder, both sorted, without hidden ones and links."""
        with self._errors():
            infos = self.fs.ls(folder, detail=True)
        shown = sorted((info for info in infos if _base(info)[:1] not in ("", ".")), key=_base)
        shown = [info for info in shown if info["name"].rstrip("/") != folder.rstrip("/")]  # some list it, too
        folders = [info["name"].rstrip("/") for info in shown if info["type"] == "directory" and not info.get("islink")]
        return folders, [_entry(info) for info in shown if info["type"] != "directory"]

    def names(self, folder: str) -> set[str]:
        """The names, relative to ``folder``, of all files below it; empty when there is no such folder."""
        start = self.path(folder)
        with self._errors():
            if not self.fs.exists(start):
                return set()
            return {str(path)[len(start) + 1 :] for path in self.fs.find(start)}

    def has_files(self) -> bool:
        """Whether it holds anything that is not hidden."""
        with self._errors():
            return self.fs.exists(self.root) and any(self.children(self.root))

    def remove(self, folder: str) -> None:
        """Remove a folder with all that is in it, if it exists."""
        with self._errors():
            if self.fs.exists(self.path(folder)):
                self.fs.rm(self.path(folder), recursive=True)

    def read(self, name: str) -> bytes | None:
        """The content of a small file; None when it does not exist."""
        with self._errors():
            path = self.path(name)
            return bytes(self.fs.cat_file(path)) if self.fs.exists(path) else None

    def open(self, path: str) -> IO[bytes]:
        """Open a file for reading."""
        with self._errors():
            stream: IO[bytes] = self.fs.open(path, "rb")
            return stream

    def put(self, name: str, write: Callable[[IO[bytes]], object]) -> str:
        """Write a file whole by ``write(stream)``, which must not seek; returns its SHA-256.

        A store that is not local gets it in one upload, from a temporary file: an upload that fails leaves nothing, and
        fsspec would finish one whose writing has failed.
        """
        digest = hashlib.sha256()

        def hashed(stream: IO[bytes]) -> None:
            write(_Hashed(stream, digest))  # type: ignore[arg-type]

        if self.is_local:
            write_atomic(self.path(name), hashed)
            return digest.hexdigest()
        with tempfile.NamedTemporaryFile() as local:
            try:
                hashed(local)
                local.flush()
            except OSError as error:
                raise CodefendError(f"cannot write {local.name}: {error.strerror or error}") from error
            with self._errors():
                self.fs.makedirs(self.path(name).rpartition("/")[0], exist_ok=True)
                self.fs.put_file(local.name, self.path(name))
        return digest.hexdigest()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except CodefendError:
            raise
        except Exception as error:  # every file system has exceptions of its own
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise CodefendError(f"cannot use {self.url}: {reason}") from error


class _Hashed:
    """A stream for writing that hashes what goes through."""

    def __init__(self, stream: IO[bytes], digest: Any) -> None:
        self._stream, self._digest, self._size = stream, digest, 0
        self.closed = False

    def write(self, data: bytes) -> int:
        self._digest.update(data)
        self._size += len(data)
        return self._stream.write(data)

    def tell(self) -> int:
        return self._size

    def flush(self) -> None:
        self._stream.flush()

    def close(self) -> None:
        """The stream is closed by whoever opened it."""

    def readable(self) -> bool:
        return False

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False


def _base(info: dict[str, Any]) -> str:
    return str(info["name"]).rstrip("/").rpartition("/")[2]


def _entry(info: dict[str, Any]) -> Entry:
    changed = next((info[key] for key in ("ETag", "etag", "mtime", "LastModified", "created") if info.get(key)), "")
    return Entry(str(info["name"]), int(info.get("size") or 0), str(changed))
