"""Which inputs are a corpus: URLs, archives and tables. Apart from the package `corpus`, whose import takes time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

TARS = (".tar", ".tar.gz", ".tgz")
TABLES = (".parquet",)

Kind = Literal["tar", "table", "group"]


def kind_of(name: str) -> Kind | None:
    """Archive or table, by the ending of a file's name."""
    lower = name.lower()
    return "tar" if lower.endswith(TARS) else "table" if lower.endswith(TABLES) else None


def is_corpus(paths: Sequence[str], out: str) -> bool:
    """Whether purifying needs `codefend.purifiers.corpus`: a URL, an archive or a table, or a folder that holds one."""
    if any("://" in path or "::" in path for path in (*paths, out)):
        return True
    return any(kind_of(path) or _holds_units(Path(path)) for path in paths)


def _holds_units(folder: Path) -> bool:
    return folder.is_dir() and any(kind_of(path.name) for path in folder.rglob("*"))
