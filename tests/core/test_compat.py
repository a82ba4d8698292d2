"""Names of saved configs that have changed are still understood."""

from __future__ import annotations

from pathlib import Path

import pytest

from codefend.cli import main
from codefend.cli.presets import PRESETS
from codefend.core.compat import OLD_PRESETS, current_attack_options
from codefend.core.settings import override, read_settings
from codefend.training.bridge import BridgeConfig


def test_old_options_of_attacks_have_their_current_names() -> None:
    assert current_attack_options({"say": "hello", "steps": "3"}) == {"sentence": "hello", "steps": "3"}


def test_old_presets_have_the_settings_of_their_recipes() -> None:
    for name in ("bridge-robust", "bridge-replay"):
        file = Path(__file__).parents[2] / "recipes" / f"{name}.toml"
        assert str(Path(*file.parts[-2:])) in OLD_PRESETS[name].current
        assert PRESETS[name].build({"seed": "3"}) == override(BridgeConfig(seed=3), read_settings(file))


def test_an_ablation_that_was_a_preset_names_its_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "ablation-static", "--run", "r"]) == 2
    assert "bridge --config recipes/ablations/static.toml" in capsys.readouterr().err
