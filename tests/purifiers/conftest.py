from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

import corpus_kit as kit


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return kit.write_all(tmp_path / "in")


@pytest.fixture
def memory() -> Iterator[str]:
    """An object store: nothing is renamed or appended to, and a file is there when its upload has ended."""
    yield "memory://bucket"
    fsspec.filesystem("memory").rm("/bucket", recursive=True)
