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
CORE = {"bridge", "bridge-detail", "bridge-large", "bridge-transfer"}  # weights in the wheel of codefend
CORE_LIMIT, MODELS_LIMIT = 60e6, 95e6  # bytes; the Python Package Index takes 100 MB a file


def settings(folder: Path) -> dict[str, dict[str, dict[str, object]]]:
    return tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))


def test_what_one_wheel_leaves_out_the_other_brings() -> None:
    excluded = settings(ROOT)["tool"]["hatch"]["build"]["targets"]["wheel"]["exclude"]  # type: ignore[index]
    included = settings(MODELS)["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]  # type: ignore[index]
    folders = {source.removeprefix("../../"): place for source, place in included.items() if "/src/" in source}
    assert sorted(folders) == sorted(excluded)
    for source, place in folders.items():
        assert (ROOT / source).is_dir(), source
        assert place == source.replace("src/codefend", "codefend_models"), source
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
def wheels(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The wheels of codefend and codefend-models, in this order."""
    if missing := [name for name in ("build", "hatchling", "twine") if find_spec(name) is None]:
        pytest.skip(f"the release extra, whose {missing[0]} is missing, builds packages")
    out = tmp_path_factory.mktemp("dist")
    for folder in (ROOT, MODELS):
        call(sys.executable, "-m", "build", "--no-isolation", "--wheel", "-o", out, folder)
    return sorted(out.glob("*.whl"))


@pytest.mark.slow
def test_wheels_are_small_and_pass_twine(wheels: list[Path]) -> None:
    core, models = wheels
    assert core.stat().st_size <= CORE_LIMIT
    assert models.stat().st_size <= MODELS_LIMIT
    call(sys.executable, "-m", "twine", "check", "--strict", core, models)
    with zipfile.ZipFile(core) as archive:
        weights = {name.split("/")[2] for name in archive.namelist() if name.startswith("codefend/weights/")}
    assert weights == CORE


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
