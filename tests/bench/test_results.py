"""Views of rows: worst cases, rates, gates and paired differences."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from codefend.bench.report import read_report
from codefend.bench.results import (
    CLEAN,
    WORST,
    Group,
    Rate,
    gaps,
    gate,
    group_of,
    group_rows,
    pair_rows,
    scores,
    slug,
    strongest,
    success_rates,
    summarize,
    worst_rows,
)
from report_kit import row_of, row_with

pytestmark = pytest.mark.usefixtures("few_samples")


def test_worst_case_takes_each_examples_lowest_score_and_every_weaker_threat(evaluated: Path) -> None:
    groups = group_rows(read_report(evaluated).rows)
    for group, rows in worst_rows(groups).items():
        for row in rows:
            rivals = [
                float(other["worst_scores"][other["headline"]])
                for key, members in groups.items()
                for other in members
                if key.attack != CLEAN
                and (key.task, key.defense, key.eps) == (group.task, group.defense, group.eps)
                and other["example"] == row["example"]
                and (key.threat == "T0" or group.threat == "T2")
            ]
            assert row["worst_scores"][row["headline"]] == min(rivals)


def test_worst_case_leaves_out_examples_that_not_every_attack_reached() -> None:
    rows = [row_of(0, 1.0), row_of(1, 1.0), row_of(0, 0.0, attack="b")]
    worst = worst_rows(group_rows(rows))
    assert [(g.attack, [r["example"] for r in members]) for g, members in worst.items()] == [(WORST, ["0"])]
    assert next(iter(worst.values()))[0]["attack"] == "b"


def test_unscored_is_not_zero() -> None:
    (entry, worst) = summarize([row_of(0, None), row_of(1, 1.0)])
    assert entry.score.mean == worst.score.mean == 1.0
    assert entry.score.n == 1


def test_the_retained_share_is_of_the_undefended_clean_score() -> None:
    clean = [row_of(i, 0.8, defense="none", threat="clean", attack=CLEAN, eps=0.0) for i in range(3)]
    blunted = [row_of(i, 0.4, threat="clean", attack=CLEAN, eps=0.0) for i in range(3)]
    attacked = [row_of(i, 0.2) for i in range(2)]
    retained = {
        entry.group.attack + entry.group.defense: entry.retained for entry in summarize(clean + blunted + attacked)
    }
    assert retained[f"{CLEAN}d"] == pytest.approx(0.5)
    assert retained["ad"] == pytest.approx(0.25)


def test_success_rate_is_the_worst_case_over_attacks_and_weaker_threats() -> None:
    oblivious = [row_with(0, 1), row_with(1, 0), row_with(2, 0), row_with(3, None)]
    other = [
        row_with(0, 0, attack="b"),
        row_with(1, 0, 1, attack="b"),
        row_with(2, 0, attack="b"),
        row_with(3, None, 1, attack="b"),
    ]
    adaptive = [row_with(i, int(i == 2), threat="T2") for i in range(3)]
    rates = {group.threat: rate for group, rate in success_rates(oblivious + other + adaptive).items()}
    assert rates == {"T0": Rate(2, 3), "T2": Rate(3, 3)}  # the third answer was wrong before
    assert [group.threat for group in strongest(success_rates(oblivious + adaptive))] == ["T2"]
    assert success_rates([row_with(0, 1), row_with(1, 0), row_with(0, 0, threat="T2")]) == {
        Group("t", "d", "T0", WORST, 0.1): Rate(1, 2),
        Group("t", "d", "T2", WORST, 0.1): Rate(1, 1),  # only what T2 reached
    }


def test_a_gate_refuses_images_above_the_scores_of_clean_ones() -> None:
    clean = [row_of(i, 1.0, attack=CLEAN, threat="clean", suspicion=float(i)) for i in range(40)]
    high, low = (row_with(i, 1, suspicion=value) for i, value in enumerate((37.5, 36.0)))
    unscored = row_with(2, 1)
    rows = [*clean, high, low, unscored]
    assert [gate(rows)(row) for row in (high, low, unscored)] == [True, False, False]  # 2 of 40 exceed it
    assert list(success_rates(rows, refused=gate(rows)).values()) == [Rate(2, 3)]
    assert not gate([high])(high)


def test_paired_gap_to_the_best() -> None:
    rows = [row_of(i, 1.0, defense="good") for i in range(5)] + [row_of(i, float(i == 0)) for i in range(5)]
    found, comparisons = gaps(group_rows(rows))
    ((group, gap),) = found.items()
    assert comparisons == 1
    assert group.defense == "d"
    assert gap.mean == pytest.approx(0.8)
    assert gap.low > 0
    assert [a["example"] for a, _ in pair_rows(rows[:3], rows[5:7])] == ["0", "1"]


def test_equal_defenses_are_seldom_told_apart_however_many_there_are() -> None:
    told = 0
    for seed in range(20):
        right = torch.rand(8, 64, generator=torch.Generator().manual_seed(seed)) < 0.5
        rows = [row_of(i, float(right[d, i]), defense=str(d)) for d in range(8) for i in range(64)]
        found, comparisons = gaps(group_rows(rows))
        told += any(gap.low > 0 for gap in found.values())
    assert comparisons == 28
    assert told <= 3  # 9 without the correction


def test_group_of_a_row_and_scores_of_many() -> None:
    row = row_of(0, 0.5)
    assert group_of(row) == Group("t", "d", "T0", "a", 0.1)
    assert scores([row, row_of(1, None)]).isnan().tolist() == [False, True]


def test_slugs_are_file_names_and_differ() -> None:
    labels = ["bridge", "bridge:evaluations=2", "bridge_evaluations=2", "../up", "8/255", ""]
    names = [slug(label) for label in labels]
    assert len(set(names)) == len(labels)
    assert all("/" not in name and not name.startswith(".") and name for name in names)
