"""Configs: specs of defenses and attacks, presets, and no torch."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from codefend.bench import AttackChoice, DefenseChoice, EvalConfig
from codefend.core.settings import override
from codefend.types import CodefendError


def test_spelling_of_defenses_and_attacks() -> None:
    config = override(
        EvalConfig(), {"attacks": "apgd:steps=9,restarts=3,square", "defenses": "none,diffpure:t=0.1,steps=5"}
    )
    assert config.attacks == ("apgd:steps=9,restarts=3", "square")
    assert config.defenses == ("none", "diffpure:t=0.1,steps=5")
    assert DefenseChoice.parse("diffpure:t=0.1,steps=5").options == {"t": 0.1, "steps": 5}
    assert DefenseChoice.parse("some/folder").name == "some/folder"
    choice = AttackChoice.parse(config.attacks[0], config)
    assert choice.steps == 9
    assert getattr(choice.build(), "restarts", None) == 3
    assert AttackChoice.parse("square", config).steps == 5000
    assert AttackChoice.parse("apgd", replace(config, restarts=2)).options == {"restarts": "2"}


def test_importing_the_config_does_not_import_torch() -> None:
    code = "import sys, codefend.bench; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=dict(os.environ)).returncode == 0


def test_spelling_of_a_defense_with_a_prompt() -> None:
    text = "none,bridge+prompt=doubt,diffpure:t=0.1,steps=5+prompt=some/policy.json,none+prompt=doubt"
    config = override(EvalConfig(), {"defenses": text})
    assert config.defenses == (
        "none",
        "bridge+prompt=doubt",
        "diffpure:t=0.1,steps=5+prompt=some/policy.json",
        "none+prompt=doubt",
    )
    choice = DefenseChoice.parse(config.defenses[2])
    assert (choice.name, choice.options, choice.prompt) == ("diffpure", {"t": 0.1, "steps": 5}, "some/policy.json")
    for wrong in ("+prompt=doubt", "bridge+prompt="):
        with pytest.raises(CodefendError, match="write PURIFIER"):
            DefenseChoice.parse(wrong)


@pytest.mark.parametrize("name", ["quick", "standard", "full", "seen-unseen", "transfer"])
def test_presets_are_valid(name: str) -> None:
    from codefend.bench.config import AttackChoice, check
    from codefend.bench.transfer import check_matrix
    from codefend.cli.presets import PRESETS

    config = PRESETS[name].build({"judges": "another"} if name == "transfer" else {})
    if name == "transfer":
        check_matrix(config)
    check(config)
    choices = [AttackChoice.parse(label, config) for label in config.attacks]
    if name == "full":
        families = {type(choice.build()).__name__ for choice in choices}
        assert len(families) >= 15
        means = {(c.adaptive.bpda, c.adaptive.process > 0, c.adaptive.evade > 0) for c in choices}
        assert len(means) == 4  # each alone, and none
