"""The front door is light: importing the package or asking for help loads no tensor or model library."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import codefend

SRC = str(Path(codefend.__file__).parents[1])
HEAVY = ("torch", "transformers", "numpy", "PIL", "rich", "matplotlib", "starlette")


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": SRC}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False)


def loaded_by(statement: str) -> list[str]:
    script = f"{statement}\nimport sys\nprint('LOADED', *(name for name in {HEAVY} if name in sys.modules))"
    result = python("-c", script)
    assert result.returncode == 0, result.stderr
    return result.stdout.rpartition("LOADED")[2].split()


@pytest.mark.parametrize(
    "statement",
    [
        "import codefend",
        "import codefend.cli",
        "import codefend.core.runs, codefend.core.settings",
        "from codefend.cli import main; main(['--help'])",
        "from codefend.cli import main; main(['purify', '--help'])",
        "from codefend.cli import main; main(['list', 'attacks'])",
        "from codefend.cli import main; main(['lst'])",
    ],
)
def test_no_heavy_library_is_loaded(statement: str) -> None:
    assert loaded_by(statement) == []


@pytest.mark.bench  # a time depends on the other load of the machine
def test_help_takes_less_than_half_a_second() -> None:
    python("-m", "codefend.cli", "--help")  # compiles the bytecode once
    seconds = []
    for _ in range(5):
        start = time.monotonic()
        result = python("-m", "codefend.cli", "--help")
        seconds.append(time.monotonic() - start)
        assert result.returncode == 0
        assert "purify" in result.stdout
        if seconds[-1] < 0.5:
            return
    pytest.fail(f"fastest of {len(seconds)}: {min(seconds):.2f} s")


def test_version_is_that_of_the_package() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", codefend.__version__)
    assert python("-m", "codefend.cli", "--version").stdout == f"codefend {codefend.__version__}\n"


def test_unknown_attributes_are_named() -> None:
    with pytest.raises(AttributeError, match="no attribute 'load_purifer'"):
        codefend.load_purifer  # noqa: B018
    assert codefend.Budget().eps == 8 / 255
