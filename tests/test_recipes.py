"""Recipes say what they say: every command is one that the program takes, and a stage ends in time."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from codefend.cli import main
from codefend.presets import PRESETS

RECIPES = Path(__file__).parent.parent / "recipes"
NAMES = sorted(path.name for path in RECIPES.glob("*.sh") if path.name != "common.sh")
pytestmark = pytest.mark.skipif(shutil.which("timeout") is None, reason="recipes need GNU coreutils")


def run(name: str, stub: str, tmp_path: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a recipe with ``stub`` in place of the program."""
    program = tmp_path / "bin" / "codefend"
    program.parent.mkdir(exist_ok=True)
    program.write_text(f"#!/usr/bin/env bash\n{stub}\n")
    program.chmod(0o755)
    environment = {"PATH": f"{program.parent}:{os.environ['PATH']}", "RUNS": str(tmp_path / "runs"), **variables}
    return subprocess.run(
        ["bash", str(RECIPES / name)], env=environment, text=True, capture_output=True, timeout=60, check=False
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_command_is_one_that_the_program_takes(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "calls"
    done = run(name, f'printf "%s\\0" "$@" >> {log}; printf "\\n" >> {log}', tmp_path)
    assert done.returncode == 0, done.stderr
    calls = [line.rstrip("\0").split("\0") for line in log.read_text().splitlines()]
    assert calls
    for call in calls:
        if call[0] in ("report", "card"):  # nothing to show before there are results
            assert main([call[0], "--help"]) == 0
            continue
        assert main([*call, "--dry-run"]) == 0, capsys.readouterr().err


def test_every_training_has_a_recipe() -> None:
    text = "".join((RECIPES / name).read_text() for name in NAMES)
    trainings = {"pocket", "prior", "bridge", "hgd", "flowpure", "flowpure-gauss", "adbm", "codefend-r", "fare"}
    assert all(f"codefend train {name} " in text for name in trainings)
    ablations = (RECIPES / "ablations.sh").read_text().partition('names="')[2].partition('"')[0].split()
    assert {f"ablation-{name}" for name in ablations} == {name for name in PRESETS if name.startswith("ablation-")}


def test_a_stage_ends_in_time_and_says_how_to_go_on(tmp_path: Path) -> None:
    done = run("prior.sh", "exec sleep 30", tmp_path, MINUTES="0.005")
    assert done.returncode == 124
    assert "run this recipe again" in done.stderr
    assert "done:" not in done.stdout


def test_a_failed_stage_ends_the_recipe(tmp_path: Path) -> None:
    done = run("pocket.sh", "exit 2", tmp_path)
    assert done.returncode == 2
    assert "again" not in done.stderr
    assert done.stdout == ""
