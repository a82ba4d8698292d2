"""Names from before 2026-11-30 that saved configs and scripts may still use. To be removed in 2027-06."""

from __future__ import annotations

from collections.abc import Mapping

ATTACK_OPTIONS = {"say": "sentence", "plants": "templates"}


def current_attack_options(options: Mapping[str, str]) -> dict[str, str]:
    """``options`` of an attack under their current names."""
    return {ATTACK_OPTIONS.get(key, key): value for key, value in options.items()}
