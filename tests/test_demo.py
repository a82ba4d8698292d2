"""The demo's one sentence follows the figures."""

from __future__ import annotations

import pytest

from codefend.demo import verdict
from codefend.results import Entry, Group, Rate
from codefend.tasks.intervals import Interval


def entries(clean: float, bare: float, defended: float, adaptive: float) -> list[Entry]:
    figures = {
        ("none", "clean", "none"): clean,
        ("none", "T0", "apgd"): bare,
        ("bridge", "T0", "apgd"): defended,
        ("bridge", "T2", "apgd"): adaptive,
    }
    return [
        Entry(
            Group(task, *key, 0.03),
            "linf",
            "exact",
            Interval(mean, mean, mean, 4),
            mean,
            1,
            1.0,
            Rate(0, 4),
            Rate(0, 4),
        )
        for key, mean in figures.items()
        for task in ("caption", "vqa")
    ]


@pytest.mark.parametrize(
    ("figures", "works"),
    [
        ((1.0, 0.0, 0.8, 0.1), True),
        ((1.0, 0.6, 0.9, 0.1), False),  # the attack is too weak to show anything
        ((1.0, 0.1, 0.2, 0.1), False),  # the bridge doesn't help
        ((0.0, 0.0, 0.0, 0.0), False),  # nothing is answered
    ],
)
def test_the_verdict_follows_the_figures(figures: tuple[float, float, float, float], works: bool) -> None:
    found, sentence = verdict(entries(*figures))
    assert found == works
    assert ("does NOT" in sentence) != works
    assert f"{figures[2]:.2f} behind the bridge" in sentence
