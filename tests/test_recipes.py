"""Recipes: every command is valid, they repeat the shipped trainings, and a stage has a time limit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from codefend.cli import main
from codefend.core.assets import asset

RECIPES = Path(__file__).parent.parent / "recipes"
NAMES = sorted(path.name for path in RECIPES.glob("*.sh") if path.name != "common.sh")
SEEDS = 11, 12, 13, 21, 22, 31, 41, 51, 80, 81  # of the shipped bridges' banks
BANKS = dict(zip(SEEDS, "abcdefghij", strict=True))
BANKS |= {seed: f"views-{seed}" for seed in range(60, 74)}
pytestmark = pytest.mark.skipif(shutil.which("timeout") is None, reason="recipes need GNU coreutils")


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes name files from the root of the repository, where they run."""
    monkeypatch.chdir(RECIPES.parent)


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


def calls(name: str, tmp_path: Path, **variables: str) -> list[list[str]]:
    """The arguments of every command of a recipe."""
    log = tmp_path / f"calls-{name}"
    process = run(name, f'printf "%s\\0" "$@" >> {log}; printf "\\n" >> {log}', tmp_path, **variables)
    assert process.returncode == 0, process.stderr
    commands = [line.rstrip("\0").split("\0") for line in log.read_text().splitlines()]
    assert commands
    return commands


def config(call: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The config of a command, with its run folder."""
    capsys.readouterr()
    assert main([*call, "--dry-run"]) == 0
    return {"run": call[call.index("--run") + 1], **json.loads(capsys.readouterr().out)}


@pytest.mark.parametrize("name", NAMES)
def test_every_command_is_valid(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for call in calls(name, tmp_path):
        if call[0] in ("report", "card", "build-victim"):  # they need results
            assert main([call[0], "--help"]) == 0
            continue
        assert main([*call, "--dry-run"]) == 0, capsys.readouterr().err


def trainings(commands: list[list[str]], kind: str, capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """The configs of ``codefend train KIND`` among the commands."""
    return [config(call, capsys) for call in commands if call[:2] == ["train", kind]]


@pytest.mark.parametrize("name", ["bridge.sh", "bridge-large.sh"])
def test_one_command_leads_from_the_prior_to_each_bridge(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = calls(name, tmp_path, PRIOR="P")
    banks = {config(call, capsys)["run"] for call in commands if call[0] == "pairs"}
    *detail, teacher = trainings(commands, "bridge", capsys)
    encoders, robust = (trainings(commands, kind, capsys) for kind in ("encoder", "robust"))
    weights = [f"{values['run']}/weights" for values in (*detail, *robust)]
    assert (len(detail), len(encoders)) == (10, 3)
    assert [values["prior"] for values in detail] == ["P", *weights[:9]]
    assert teacher["prior"] == weights[8]
    large = f"{teacher['run']}/weights"
    starts = {"bridge.sh": weights[9:-1], "bridge-large.sh": [large]}
    assert [values["prior"] for values in robust] == starts[name]
    assert robust[-1]["teacher"] == large
    assert all(set(values["pairs"]) <= banks for values in (*detail, teacher))
    assert all(set(values["zoo"]) <= {f"{encoder['run']}/weights" for encoder in encoders} for values in robust)
    assert f"{robust[-1]['run']}/weights" == commands[-1][1]  # calibrated last


@pytest.mark.parametrize("name", ["bridge.sh", "bridge-large.sh"])
def test_a_given_teacher_stands_for_the_stages_before(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = calls(name, tmp_path, TEACHER="T")
    assert not trainings(commands, "bridge", capsys)
    first, *_ = robust = trainings(commands, "robust", capsys)
    assert first["prior"] == ("bridge-detail" if name == "bridge.sh" else "T")
    assert robust[-1]["teacher"] == "T"
    assert [Path(config(call, capsys)["run"]).name for call in commands if call[0] == "pairs"] == ["pairs-held-out"]


@pytest.mark.parametrize("folder", ["src/codefend/weights/bridge-detail", "recipes/checkpoints/teacher-large"])
def test_a_recipe_repeats_the_training_of_the_weights(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = Path(folder).name
    training = json.loads(Path(folder, "training.json").read_text())
    last = config([call for call in calls(f"{name}.sh", tmp_path) if call[0] == "train"][-1], capsys)
    places = {"train", "prior", "pairs", "save_every", "photographs"}
    places |= {"sigma", "strength"}  # defaults of the purifier, which don't decide the weights
    expected = {key: value for key, value in training["config"].items() if key not in places}
    assert {key: last[key] for key in expected} == expected
    shipped = {f"{tmp_path}/runs/pairs-{BANKS[bank['config']['seed']]}": bank for bank in training["pairs"]}
    assert Counter(last["pairs"]) == {folder: bank["times"] for folder, bank in shipped.items()}
    banks = [call for script in ("pairs.sh", f"{name}.sh") for call in calls(script, tmp_path) if call[0] == "pairs"]
    runs = {bank["run"]: bank for bank in (config(call, capsys) for call in banks)}
    for folder, bank in shipped.items():
        steps = "answer_steps" if runs[folder]["kinds"] == ["answers"] else "steps"
        later = {"views", "shares"} & set(bank["config"])
        for key in ("seed", "kinds", "max_eps", steps, *later):
            assert runs[folder][key] == bank["config"][key]
        assert runs[folder]["count"] == sum(kind["pairs"] for kind in bank["made"])  # some were interrupted


def test_the_recipe_of_the_second_victim_has_the_settings_of_the_shipped_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training = json.loads((asset("weights/smolvlm-pocket") / "training.json").read_text())
    first = config(calls("smolvlm-pocket.sh", tmp_path)[0], capsys)
    expected = {key: value for key, value in training["config"].items() if key != "train"}
    assert {key: first[key] for key in expected} == expected


@pytest.mark.parametrize("name", ["bridge", "bridge-large"])
def test_a_recipe_has_the_settings_of_the_shipped_bridges(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training = json.loads((asset(f"weights/{name}") / "training.json").read_text())
    last = config([call for call in calls(f"{name}.sh", tmp_path) if call[0] == "train"][-1], capsys)
    places = {"train", "prior", "teacher", "zoo", "natural", "sigma"}  # sigma: the purifier's default
    expected = {key: value for key, value in training["config"].items() if key not in places}
    assert {key: last[key] for key in expected} == expected
    shipped = json.loads((asset(f"weights/{name}") / "config.json").read_text())["options"]
    assert {key: last[key] for key in shipped} == shipped
    families = [Path(str(folder).removesuffix("/weights")).name for folder in training["config"]["zoo"]]
    assert [Path(str(folder).removesuffix("/weights")).name for folder in last["zoo"]] == families


def test_every_training_has_a_recipe() -> None:
    text = "".join((RECIPES / name).read_text() for name in NAMES)
    trainings = {"pocket", "smolvlm-pocket", "prior", "bridge", "hgd", "flowpure", "flowpure-gauss", "adbm"}
    trainings |= {"pocket-photographs", "codefend-r", "fare", "tecoa", "encoder", "robust"}
    assert all(f"codefend train {name} " in text for name in trainings)
    ablations = (RECIPES / "ablations.sh").read_text().partition('names="')[2].partition('"')[0].split()
    assert set(ablations) == {file.stem for file in RECIPES.glob("ablations/*.toml")}


def test_a_stage_has_a_time_limit_and_names_the_way_to_resume(tmp_path: Path) -> None:
    process = run("prior.sh", "exec sleep 30", tmp_path, MINUTES="0.005")
    assert process.returncode == 124
    assert "run this recipe again" in process.stderr
    assert "done:" not in process.stdout


def test_a_failed_stage_ends_the_recipe(tmp_path: Path) -> None:
    process = run("pocket.sh", "exit 2", tmp_path)
    assert process.returncode == 2
    assert "again" not in process.stderr
    assert process.stdout == ""
