"""Names from before 2026-11-30 that saved configs and scripts may still use. To be removed in 2027-06."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

ATTACK_OPTIONS = {"say": "sentence", "plants": "templates"}
OLD_ABLATION = "ablation-"  # presets that are files in recipes/ablations


class OldPreset(NamedTuple):
    """A preset that has become ``preset`` with ``settings``; ``current`` is how to write it today."""

    current: str
    preset: str
    settings: Mapping[str, str]


def _settings(text: str) -> dict[str, str]:
    return dict(item.split("=") for item in text.split())


OLD_PRESETS = {
    "pocket-lite2": OldPreset("pocket --set encoder=lite2", "pocket", _settings("encoder=lite2")),
    "bridge-robust": OldPreset(
        "bridge --config recipes/bridge-robust.toml",
        "bridge",
        _settings(
            "noise_free=0 min_sigma=0.1 max_sigma=0.1 sigma=0.1 clean=0.1 at_one=0.9 mined=0.6 lean=true "
            "max_eps=10/255 eps_ramp=150 answers=0.35 w_answers=0.4 w_words=0.8 steps=1000 lr=6e-4"
        ),
    ),
    "bridge-replay": OldPreset(
        "bridge --config recipes/bridge-replay.toml",
        "bridge",
        _settings(
            "replay=5 mined=0.5 answers=0.25 max_eps=8/255 noise_free=0.2 min_sigma=0.03 max_sigma=0.12 sigma=0.05 "
            "at_one=0.95 clean=0.125 w_identity=8 w_features=1.2 w_words=0.8 w_answers=0.4 steps=2200 lr=6e-4 "
            "warmup=30 save_every=100"
        ),
    ),
}


def current_attack_options(options: Mapping[str, str]) -> dict[str, str]:
    """``options`` of an attack under their current names."""
    return {ATTACK_OPTIONS.get(key, key): value for key, value in options.items()}
