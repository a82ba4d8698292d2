"""Installed files: found in the package or in codefend-models, and one error where they are missing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from codefend.core import assets
from codefend.types import CodefendError


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """An empty package, and an installed codefend-models without files."""
    package, models = tmp_path / "package", tmp_path / "site" / "codefend_models"
    for folder in (package, models):
        folder.mkdir(parents=True)
    (models / "__init__.py").touch()
    monkeypatch.setattr(assets, "PACKAGE", package)
    monkeypatch.syspath_prepend(str(models.parent))
    monkeypatch.delitem(sys.modules, "codefend_models", raising=False)
    assets.roots.cache_clear()
    monkeypatch.setattr(assets, "roots", assets.roots.__wrapped__)
    return package, models


def put(root: Path, name: str) -> Path:
    path = root / "weights" / name / "model.safetensors"
    path.parent.mkdir(parents=True)
    path.touch()
    return path


def test_files_are_found_in_either_package_and_this_one_comes_first(places: tuple[Path, Path]) -> None:
    package, models = places
    mine, theirs, other = put(package, "bridge"), put(models, "bridge"), put(models, "pocket")
    assert assets.asset("weights/bridge") == mine.parent != theirs.parent
    assert assets.asset("weights/pocket") == other.parent
    assert assets.assets("weights/*/model.safetensors") == [mine, other]


def test_missing_files_name_the_command_that_installs_them(places: tuple[Path, Path]) -> None:
    assert assets.find_asset("weights/pocket") is None
    with pytest.raises(CodefendError, match=r"^weights/pocket is not installed: pip install 'codefend\[models\]'$"):
        assets.asset("weights/pocket")
