"""Answers on disk, keyed by content, in one SQLite file.

Own code instead of diskcache: that reads none of the caches that users already have, and unpickles stored values.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import threading
from pathlib import Path

from codefend.types import CodefendError


def default_cache() -> Path:
    """``$CODEFEND_CACHE``, or the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(os.environ.get("CODEFEND_CACHE") or Path(base) / "codefend") / "answers.sqlite"


def content_key(*parts: object) -> str:
    """SHA-256 of everything that an answer depends on."""
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False, sort_keys=True).encode()).hexdigest()


class ResponseCache:
    """Texts by key. Every ``put`` is on disk when it returns; threads and processes may share the file.

    Raises CodefendError when the file cannot be used.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._lock = path, threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, timeout=30, check_same_thread=False, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, text TEXT NOT NULL)")
        except (sqlite3.Error, OSError) as error:
            raise CodefendError(f"cannot use the answer cache {path}: {error}; name another with cache=FILE") from error

    def get(self, key: str) -> str | None:
        try:
            with self._lock:
                row = self._db.execute("SELECT text FROM answers WHERE key = ?", (key,)).fetchone()
        except sqlite3.Error as error:
            raise CodefendError(
                f"cannot read the answer cache {self.path}: {error}; name another with cache=FILE"
            ) from error
        return None if row is None else str(row[0])

    def put(self, key: str, text: str) -> None:
        try:
            with self._lock:
                self._db.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, text))
        except sqlite3.Error as error:
            raise CodefendError(f"cannot write the answer cache {self.path}: {error}") from error
