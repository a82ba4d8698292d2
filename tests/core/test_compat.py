"""Names of saved configs that have changed are still understood."""

from __future__ import annotations

from codefend.core.compat import current_attack_options


def test_old_options_of_attacks_have_their_current_names() -> None:
    assert current_attack_options({"say": "hello", "steps": "3"}) == {"sentence": "hello", "steps": "3"}
