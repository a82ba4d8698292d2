"""Reports of toy runs: the figures are right."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from codefend.bench.report import Report, read_report
from codefend.bench.report.plots import score_against_eps
from codefend.bench.report.table import number, rate
from codefend.bench.report.tables import flags_of, leaderboard, overview, results, seen_and_unseen, success
from codefend.bench.results import (
    CLEAN,
    OVERALL,
    WORST,
    Group,
    Rate,
    eps_label,
    gaps,
    gate,
    group_of,
    group_rows,
    overall,
    pair_rows,
    scores,
    strongest,
    success_rates,
    summarize,
    worst_rows,
)
from codefend.bench.sanity import Flag
from report_kit import fell, made, texts

pytestmark = pytest.mark.usefixtures("few_samples")


def test_leaderboard_ranks_by_the_adaptive_worst_case(evaluated: Path) -> None:
    table = leaderboard(read_report(evaluated), "questions")
    assert table.title == "questions: vqa_accuracy at 8/255"
    assert table.columns == (
        "rank",
        "defense",
        "clean accuracy",
        *(f"robust accuracy {t}" for t in ("T0", "T2")),
        "of clean",
        "warnings",
    )
    assert texts(table.lines, 1)[0] == "smooth"
    assert set(texts(table.lines, 1)[1:3]) == {"leaky", "none"}
    last = table.lines[-1]  # T0 only: no rank, whatever its score
    assert (last[0], last[1], last[4], last[-1]) == ("–", "jitter", "–", "no adaptive attack")


def test_results_have_every_figure_with_denominators(evaluated: Path) -> None:
    report = read_report(evaluated)
    table = results(report, "questions")
    assert len(table.lines) == sum(entry.group.task == "questions" for entry in report.entries)
    leaky = next(line for line in table.lines if line[:4] == ("leaky", "T2", "apgd", "8/255"))
    cells = dict(zip(table.columns, leaky, strict=True))
    assert cells["accuracy [95% CI]"].startswith("0.00 [")
    assert (cells["n"], cells["of clean"], cells["attack success"], cells["target forced"]) == (
        "6",
        "0%",
        "6/6 (100%)",
        "–",
    )
    targeted = next(line for line in table.lines if line[:4] == ("none", "T0", "apgd-targeted", "8/255"))
    assert re.fullmatch(r"\d/\d \(\d+%\)", targeted[table.columns.index("target forced")])
    assert len(results(report, "questions", brief=True).lines) < len(table.lines)


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
    rows = [made(0, 1.0), made(1, 1.0), made(0, 0.0, attack="b")]
    worst = worst_rows(group_rows(rows))
    assert [(g.attack, [r["example"] for r in members]) for g, members in worst.items()] == [(WORST, ["0"])]
    assert next(iter(worst.values()))[0]["attack"] == "b"


def test_the_leaderboards_worst_case_has_attacks_with_a_bound_of_their_own() -> None:
    clean = [made(i, 1.0, attack=CLEAN, threat="clean", eps=0.0) for i in range(2)]
    weak = [made(i, 1.0, eps=0.05) for i in range(2)]
    ball = [made(0, 0.5), made(1, 1.0), made(0, 0.4, threat="T2"), made(1, 1.0, threat="T2")]
    words = [made(0, 1.0, attack="words", eps=0.0), made(1, 0.2, attack="words", eps=0.0)]
    rows = [*clean, *weak, *ball, *words]
    assert [entry.score.mean for entry in overall(rows)] == pytest.approx([0.35, 0.3])
    assert {e.group.eps: e.score.mean for e in summarize(rows) if e.group[2:4] == ("T0", WORST)} == pytest.approx(
        {0.05: 1.0, 0.1: 0.75, 0.0: 0.6}
    )
    flag = Flag("zero gradient", "why", "t", "", "T0", "words", 0.0, norm="l2")
    report = Report(Path(), {"seen": ["a"]}, {"tasks": {"t": {}}}, rows, summarize(rows), [flag])
    ((_, _, _, oblivious, adaptive, *_),) = leaderboard(report, "t").lines
    assert (oblivious[:4], adaptive[:4]) == ("0.35", "0.30")
    assert leaderboard(report, "t").title == "t: m at 0.1 or an attack's own bound"
    assert overview(report).lines == (("d", "1.00 n=2", "0.35 n=2", "0.30 n=2"),)
    assert [line[4][:4] for line in results(report, "t").lines if line[1:4] == ("T0", WORST, "0.1")] == ["0.75"]


def test_the_leaderboard_inherits_warnings_about_every_attack_that_counts() -> None:
    group = Group("t", "d", "T2", OVERALL, 0.1)
    warnings = [
        Flag("zero gradient", "why", "t", "d", "T2", attack, eps) for attack, eps in (("words", 0.0), ("a", 0.1))
    ]
    weaker = Flag("zero gradient", "why", "t", "d", "T2", "a", 0.05)
    assert flags_of(group, [*warnings, weaker]) == warnings
    assert flags_of(group._replace(attack=WORST), [*warnings, weaker]) == warnings[1:]


def test_unseen_attacks_count_with_their_own_bounds() -> None:
    kinds = {"access": "white-box"}
    clean = [made(i, 1.0, attack=CLEAN, threat="clean", eps=0.0, **kinds) for i in range(2)]
    ball = [made(i, 0.9, **kinds) for i in range(2)]
    patch = [made(i, 0.3, attack="patch", eps=0.0, **kinds) for i in range(2)]
    rows = [*clean, *ball, *patch]
    report = Report(Path(), {"seen": ["a"]}, {"tasks": {"t": {}}}, rows, summarize(rows), [])
    ((_, _, _, eps, seen, unseen, gap, n),) = seen_and_unseen(report).lines
    assert (eps, seen[:4], unseen[:4], gap[:4], n) == ("0.1", "0.90", "0.30", "0.60", "2")


def test_unscored_is_not_zero() -> None:
    (entry, worst) = summarize([made(0, None), made(1, 1.0)])
    assert entry.score.mean == worst.score.mean == 1.0
    assert entry.score.n == 1


def test_the_retained_share_is_of_the_undefended_clean_score() -> None:
    clean = [made(i, 0.8, defense="none", threat="clean", attack=CLEAN, eps=0.0) for i in range(3)]
    blunted = [made(i, 0.4, threat="clean", attack=CLEAN, eps=0.0) for i in range(3)]
    attacked = [made(i, 0.2) for i in range(2)]
    retained = {
        entry.group.attack + entry.group.defense: entry.retained for entry in summarize(clean + blunted + attacked)
    }
    assert retained[f"{CLEAN}d"] == pytest.approx(0.5)
    assert retained["ad"] == pytest.approx(0.25)


def test_success_rate_is_the_worst_case_over_attacks_and_weaker_threats() -> None:
    oblivious = [fell(0, 1), fell(1, 0), fell(2, 0), fell(3, None)]
    other = [fell(0, 0, attack="b"), fell(1, 0, 1, attack="b"), fell(2, 0, attack="b"), fell(3, None, 1, attack="b")]
    adaptive = [fell(i, int(i == 2), threat="T2") for i in range(3)]
    rates = {group.threat: rate for group, rate in success_rates(oblivious + other + adaptive).items()}
    assert rates == {"T0": Rate(2, 3), "T2": Rate(3, 3)}  # the third answer was wrong before
    assert [group.threat for group in strongest(success_rates(oblivious + adaptive))] == ["T2"]
    assert success_rates([fell(0, 1), fell(1, 0), fell(0, 0, threat="T2")]) == {
        Group("t", "d", "T0", WORST, 0.1): Rate(1, 2),
        Group("t", "d", "T2", WORST, 0.1): Rate(1, 1),  # only what T2 reached
    }


def test_success_table_names_what_max_asr_reads(evaluated: Path) -> None:
    table = success(read_report(evaluated))
    cells = {line[:4]: line[4:] for line in table.lines}
    assert cells["questions", "leaky", "T2", "8/255"][::2] == ("6/6 (100%)", "yes")
    assert cells["questions", "leaky", "T0", "8/255"][2] == ""
    assert cells["questions", "jitter", "T0", "8/255"][2] == "yes"  # it has no adaptive attack
    assert cells["questions", "none", "T0", "8/255"][1] == "–"  # without a purifier there is no detection score


def test_a_gate_refuses_images_above_the_scores_of_clean_ones() -> None:
    clean = [made(i, 1.0, attack=CLEAN, threat="clean", suspicion=float(i)) for i in range(40)]
    seen, unseen = (fell(i, 1, suspicion=value) for i, value in enumerate((37.5, 36.0)))
    unknown = fell(2, 1)
    rows = [*clean, seen, unseen, unknown]
    assert [gate(rows)(row) for row in (seen, unseen, unknown)] == [True, False, False]  # 2 of 40 are above the limit
    assert list(success_rates(rows, refused=gate(rows)).values()) == [Rate(2, 3)]
    assert not gate([seen])(seen)


def test_attacks_with_a_bound_of_their_own_are_no_point_of_the_curve() -> None:
    rows = [made(0, 1.0, attack=CLEAN, threat="clean", eps=0.0), made(0, 0.0, attack="patch", eps=0.0)]
    assert score_against_eps(summarize(rows), "t") == ""
    rows += [made(0, 0.5, eps=0.1)]
    assert score_against_eps(summarize(rows), "t") != ""


def test_seen_and_unseen_attacks_are_compared_on_the_same_examples(evaluated: Path) -> None:
    report = read_report(evaluated)
    assert seen_and_unseen(report).lines == ()
    marked = replace(report, config=report.config | {"seen": ["apgd-targeted"]})
    table = seen_and_unseen(marked)
    line = next(line for line in table.lines if line[:4] == ("questions", "leaky", "T2", "8/255"))
    assert line[5].startswith("0.00")
    assert line[7] == "6"
    assert "Seen in training: apgd-targeted; unseen: apgd" in table.notes[0]
    rows = [made(0, 1.0, access="score"), made(1, 1.0, access="score")]
    rows += [made(0, 0.0, attack="new", access="score"), made(2, 0.0, attack="new", access="score")]
    lines = seen_and_unseen(replace(report, config={"seen": ["a"]}, rows=rows)).lines
    assert [(line[4], line[5], line[6], line[7]) for line in lines] == [("1.00", "0.00", "1.00", "1")]


def test_resubmissions_are_shown_with_worst_case_and_vote(evaluated: Path) -> None:
    table = results(read_report(evaluated), "questions")
    assert table.columns[7:9] == ("worst of 2", "vote of 2")
    jitter = next(line for line in table.lines if line[:4] == ("jitter", "T0", "apgd", "8/255"))
    assert all(cell.endswith(" n=6") for cell in jitter[7:9])
    assert next(line for line in table.lines if line[0] == "leaky")[7:9] == ("–", "–")


def test_paired_gap_to_the_best() -> None:
    rows = [made(i, 1.0, defense="good") for i in range(5)] + [made(i, float(i == 0)) for i in range(5)]
    ((group, gap),) = gaps(group_rows(rows)).items()
    assert group.defense == "d"
    assert gap.mean == pytest.approx(0.8)
    assert gap.low > 0
    assert [a["example"] for a, _ in pair_rows(rows[:3], rows[5:7])] == ["0", "1"]


def test_a_worst_case_inherits_the_warnings_about_its_attacks() -> None:
    flags = [
        Flag("zero gradient", "why", "t", "d", "T2", "a", 0.1),
        Flag("not converged", "why", "t", "", "T0", "a", 0.1),
        Flag("too few examples", "why", "t"),
    ]

    def checks(*figure: object) -> list[str]:
        return [flag.check for flag in flags_of(Group(*figure), flags)]  # type: ignore[arg-type]

    assert checks("t", "d", "T2", WORST, 0.1) == checks("t", "d", "T2", "a", 0.1) == ["zero gradient"]
    assert checks("t", "other", "T0", "a", 0.1) == ["not converged"]  # all defenses are judged on the same images
    assert checks("t", "d", "T2", "a", 0.2) == checks("t", "d", "clean", CLEAN, 0.0) == []


def test_numbers_as_text() -> None:
    assert number(None) == number(float("nan")) == rate(Rate(0, 0)) == "–"
    assert rate(Rate(7, 12)) == "7/12 (58%)"
    assert eps_label(8 / 255, "linf") == "8/255"
    assert eps_label(0.5, "l2") == "0.5"
    assert eps_label(0.0, "linf") == ""


def test_group_of_a_row_and_scores_of_many() -> None:
    row = made(0, 0.5)
    assert group_of(row) == Group("t", "d", "T0", "a", 0.1)
    assert scores([row, made(1, None)]).isnan().tolist() == [False, True]
