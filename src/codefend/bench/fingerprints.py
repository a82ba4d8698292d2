"""Fingerprints of the weights that a config names, which must not change before an evaluation is resumed.

A folder that is still being trained, or was calibrated again, would mix rows of two networks in one figure.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from codefend.core.assets import find_asset
from codefend.purifiers import PURIFIERS
from codefend.types import CodefendError

CHUNK = 1 << 20  # bytes; larger files are read at both ends only, which new weights change


def fingerprints(names: Iterable[str]) -> dict[str, str]:
    """The fingerprint of each purifier or victim, as a config spells it, whose weights are in a local folder."""
    folders = {name: _folder(name) for name in names}
    return {name: _fingerprint(folder) for name, folder in folders.items() if folder is not None}


def check_unchanged(run_dir: Path, before: Mapping[str, str], now: Mapping[str, str], *, what: str = "weights") -> None:
    """Raise CodefendError naming the first of ``now`` whose fingerprint differs from the run's."""
    changed = [name for name, key in now.items() if before.get(name, key) != key]
    if changed:
        raise CodefendError(f"the {what} of {changed[0]!r} changed since {run_dir} began; use another folder")


def _folder(name: str) -> Path | None:
    """Where the weights of ``FOLDER``, ``FOLDER:options``, ``hf:FOLDER`` or a shipped name lie; None for others."""
    while name:
        for text in filter(None, (name, name.partition(":")[2])):
            places = find_asset(f"weights/{text}"), None if text in PURIFIERS else Path(text)  # as `load` does
            for place in filter(None, places):
                if place.is_dir():
                    return place
        name = name.rpartition(":")[0]
    return None


def _fingerprint(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".md"):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()} {size}\n".encode())
        with path.open("rb") as stream:
            digest.update(stream.read(CHUNK))
            if size > CHUNK:
                stream.seek(-CHUNK, 2)
                digest.update(stream.read(CHUNK))
    return digest.hexdigest()[:16]
