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
    overall,
    summarize,
)
from codefend.bench.sanity import Flag
from report_kit import column, row_of

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
    assert column(table.lines, 1)[0] == "smooth"
    assert set(column(table.lines, 1)[1:3]) == {"leaky", "none"}
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


def test_the_leaderboards_worst_case_has_attacks_with_a_bound_of_their_own() -> None:
    clean = [row_of(i, 1.0, attack=CLEAN, threat="clean", eps=0.0) for i in range(2)]
    weak = [row_of(i, 1.0, eps=0.05) for i in range(2)]
    ball = [row_of(0, 0.5), row_of(1, 1.0), row_of(0, 0.4, threat="T2"), row_of(1, 1.0, threat="T2")]
    words = [row_of(0, 1.0, attack="words", eps=0.0), row_of(1, 0.2, attack="words", eps=0.0)]
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
    clean = [row_of(i, 1.0, attack=CLEAN, threat="clean", eps=0.0, **kinds) for i in range(2)]
    ball = [row_of(i, 0.9, **kinds) for i in range(2)]
    patch = [row_of(i, 0.3, attack="patch", eps=0.0, **kinds) for i in range(2)]
    rows = [*clean, *ball, *patch]
    report = Report(Path(), {"seen": ["a"]}, {"tasks": {"t": {}}}, rows, summarize(rows), [])
    ((_, _, _, eps, attacked, unseen, gap, n),) = seen_and_unseen(report).lines
    assert (eps, attacked[:4], unseen[:4], gap[:4], n) == ("0.1", "0.90", "0.30", "0.60", "2")


def test_success_table_names_what_max_asr_reads(evaluated: Path) -> None:
    table = success(read_report(evaluated))
    cells = {line[:4]: line[4:] for line in table.lines}
    assert cells["questions", "leaky", "T2", "8/255"][::2] == ("6/6 (100%)", "yes")
    assert cells["questions", "leaky", "T0", "8/255"][2] == ""
    assert cells["questions", "jitter", "T0", "8/255"][2] == "yes"  # it has no adaptive attack
    assert cells["questions", "none", "T0", "8/255"][1] == "–"  # without a purifier there is no detection score


def test_attacks_with_a_bound_of_their_own_are_no_point_of_the_curve() -> None:
    rows = [row_of(0, 1.0, attack=CLEAN, threat="clean", eps=0.0), row_of(0, 0.0, attack="patch", eps=0.0)]
    assert score_against_eps(summarize(rows), "t") == ""
    rows += [row_of(0, 0.5, eps=0.1)]
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
    rows = [row_of(0, 1.0, access="score"), row_of(1, 1.0, access="score")]
    rows += [row_of(0, 0.0, attack="new", access="score"), row_of(2, 0.0, attack="new", access="score")]
    lines = seen_and_unseen(replace(report, config={"seen": ["a"]}, rows=rows)).lines
    assert [(line[4], line[5], line[6], line[7]) for line in lines] == [("1.00", "0.00", "1.00", "1")]


def test_resubmissions_are_shown_with_worst_case_and_vote(evaluated: Path) -> None:
    table = results(read_report(evaluated), "questions")
    assert table.columns[7:9] == ("worst of 2", "vote of 2")
    jitter = next(line for line in table.lines if line[:4] == ("jitter", "T0", "apgd", "8/255"))
    assert all(cell.endswith(" n=6") for cell in jitter[7:9])
    assert next(line for line in table.lines if line[0] == "leaky")[7:9] == ("–", "–")


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
