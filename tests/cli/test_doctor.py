"""The verb doctor and the front page of the help."""

from __future__ import annotations

from typing import Any

import pytest

from cli_kit import Run
from codefend.cli import doctor
from codefend.cli.app import app
from codefend.cli.help import GROUPS


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


def test_every_verb_is_in_one_group_of_the_help(run: Run) -> None:
    import typer

    verbs = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    grouped = [verb for group in GROUPS.values() for verb in group]
    assert sorted(grouped) == sorted(verbs)
    assert "Other:" not in run("--help")[1]
