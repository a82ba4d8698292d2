"""The two distributions: built, checked, installed into an empty environment, and used there."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
MODELS = ROOT / "packages" / "codefend-models"
CORE = {"bridge", "bridge-detail", "bridge-large"}  # weights in the wheel of codefend
CORE_LIMIT, MODELS_LIMIT = 60e6, 95e6  # bytes; the Python Package Index takes 100 MB a file


def settings(folder: Path) -> dict[str, dict[str, dict[str, object]]]:
    return tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))


def test_what_one_wheel_leaves_out_the_other_brings() -> None:
    excluded = settings(ROOT)["tool"]["hatch"]["build"]["exclude"]  # type: ignore[index]
    included = settings(MODELS)["tool"]["hatch"]["build"]["hooks"]["custom"]["files"]  # type: ignore[index]
    folders = {source: place for source, place in included.items() if source.startswith("src/")}
    assert sorted(folders) == sorted(excluded)
    for source, place in folders.items():
        assert (ROOT / source).is_dir(), source
        assert source == f"src/codefend/{place}"
    weights = {path.parent.name for path in (ROOT / "src" / "codefend" / "weights").glob("*/config.json")}
    assert weights == CORE | {Path(source).name for source in folders if "/weights/" in source}


def test_both_have_one_version() -> None:
    assert settings(ROOT)["project"]["version"] == settings(MODELS)["project"]["version"]


def test_every_extra_is_documented() -> None:
    table = (ROOT / "docs" / "install.md").read_text(encoding="utf-8").partition("## Extras")[2]
    extras = settings(ROOT)["project"]["optional-dependencies"]
    assert sorted(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == sorted(extras)  # type: ignore[call-overload]


def call(*words: object, cwd: Path = ROOT, code: int = 0) -> str:
    result = subprocess.run([str(word) for word in words], cwd=cwd, capture_output=True, text=True, timeout=200)
    assert result.returncode == code, f"{words}: {result.stdout}{result.stderr}"
    return result.stdout + result.stderr


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Source distributions of codefend and codefend-models, and the wheels built from these."""
    if missing := [name for name in ("build", "hatchling", "twine") if find_spec(name) is None]:
        pytest.skip(f"the release extra, whose {missing[0]} is missing, builds packages")
    out = tmp_path_factory.mktemp("dist")
    for folder in (ROOT, MODELS):
        call(sys.executable, "-m", "build", "--no-isolation", "-o", out, folder)
    return out


@pytest.fixture(scope="module")
def wheels(dist: Path) -> list[Path]:
    """The wheels of codefend and codefend-models, in this order."""
    return sorted(dist.glob("*.whl"))


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.mark.slow
def test_distributions_are_small_and_pass_twine(dist: Path, wheels: list[Path]) -> None:
    files = sorted(dist.iterdir())
    assert [path.name.rpartition("-0.1.0")[2] for path in files] == ["-py3-none-any.whl", ".tar.gz"] * 2
    for path in files:
        assert path.stat().st_size <= (MODELS_LIMIT if "models" in path.name else CORE_LIMIT), path.name
    call(sys.executable, "-m", "twine", "check", "--strict", *files)
    assert {name.split("/")[2] for name in names(wheels[0]) if name.startswith("codefend/weights/")} == CORE


@pytest.mark.slow
def test_a_wheel_from_the_repository_is_that_from_the_source_distribution(wheels: list[Path], tmp_path: Path) -> None:
    for folder, wheel in zip((ROOT, MODELS), wheels, strict=True):
        call(sys.executable, "-m", "build", "--no-isolation", "--wheel", "-o", tmp_path, folder)
        assert names(tmp_path / wheel.name) == names(wheel)


@pytest.mark.slow
@pytest.mark.weights
def test_the_core_purifies_and_with_models_answers(wheels: list[Path], tmp_path: Path) -> None:
    Image.fromarray(np.full((64, 80, 3), 90, np.uint8)).save(tmp_path / "photo.png")
    python = tmp_path / "venv" / "bin" / "python"
    call(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    site = Path(call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # Dependencies come from this environment, behind what is installed there; its editable codefend does not.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")

    def codefend(*words: object, code: int = 0) -> str:
        return call(python, "-I", "-m", "codefend.cli", *words, cwd=tmp_path, code=code)

    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index"]
    call(*install, wheels[0])
    assert str(site) in call(python, "-I", "-c", "import codefend; print(codefend.__file__)")
    codefend("purify", "photo.png", "-o", "clean.png")
    with Image.open(tmp_path / "clean.png") as clean:
        assert clean.size == (80, 64)
    question = "ask", "photo.png", "How many objects are there?", "--defense", "bridge"
    message = codefend(*question, code=2)
    assert "weights/pocket is not installed: pip install 'codefend[models]'" in message
    call(*install, wheels[1])
    assert codefend(*question).strip()
