"""The files of a report: the page, tables, panels and plots."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from codefend.bench.report import (
    export_rows,
    print_overview,
    print_summary,
    read_report,
    write_leaderboard,
    write_report,
)
from codefend.bench.report.board import conditions, merge
from codefend.bench.report.exports import csv_text, markdown_text
from codefend.bench.report.panels import panels
from codefend.bench.report.plots import score_against_eps
from codefend.bench.report.tables import overview
from codefend.bench.results import CLEAN
from codefend.core import images
from codefend.types import CodefendError
from report_kit import Page, copy_run, rewrite_rows

pytestmark = pytest.mark.usefixtures("few_samples")


@pytest.fixture(scope="module")
def page(evaluated: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_report(evaluated, tmp_path_factory.mktemp("out") / "r.html").read_text()


def test_the_page_is_complete_and_needs_no_network(page: str) -> None:
    read = Page(page)
    assert read.open == []
    assert read.addresses
    assert all(address.startswith("data:image/") for address in read.addresses)
    assert not {"script", "link", "iframe"} & set(read.tags)
    for heading in (
        "Overview",
        "Leaderboard",
        "Robustness against perturbation size",
        "Warnings",
        "Examples",
        "Cost",
        "Settings",
    ):
        assert heading in read.text
    assert "Unfinished" not in read.text
    assert "6 examples: the 95% interval" in read.text


def test_same_rows_make_the_same_files(evaluated: Path, page: str, tmp_path: Path) -> None:
    assert write_report(evaluated, tmp_path / "again.html").read_text() == page
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.csv", "again.html", "again.md"]


def test_the_report_is_written_to_the_run_folder_by_default(evaluated: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(evaluated, copy)
    assert write_report(copy) == copy / "report.html"
    assert write_report(copy, tmp_path) == tmp_path / "report.html"


def test_csv_has_unrounded_numbers(evaluated: Path) -> None:
    report = read_report(evaluated)
    lines = list(csv.DictReader(io.StringIO(csv_text(report))))
    assert len(lines) == len(report.entries)
    first = lines[0]
    assert float(first["score"]) == report.entries[0].score.mean
    assert float(first["mean_exact_match"]) == 1
    assert first["mean_cider_d"] == ""  # not a metric of this task
    attacked = next(line for line in lines if line["defense"] == "leaky" and line["threat"] == "T2")
    assert float(attacked["eps"]) == pytest.approx(2 / 255)


def test_rows_as_flat_tables(evaluated: Path, tmp_path: Path) -> None:
    from pyarrow import parquet

    rows = read_report(evaluated).rows
    lines = list(csv.DictReader(io.StringIO(export_rows(evaluated, tmp_path / "r.csv").read_text())))
    table = parquet.read_table(export_rows(evaluated, tmp_path / "r.parquet")).to_pylist()
    assert len(lines) == len(table) == len(rows)
    for line, cells, row in zip(lines, table, rows, strict=True):
        assert line["key"] == cells["key"] == row["key"]
        assert cells["scores.exact_match"] == row["scores"].get("exact_match")
        assert json.loads(cells["references"]) == row["references"]
        assert line["budget.steps"] == ("" if row["attack"] == CLEAN else "12")


def test_rows_go_to_known_endings_only(evaluated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CodefendError, match=r"written as .csv or .parquet"):
        export_rows(evaluated, tmp_path / "r.xlsx")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(CodefendError, match=r"pip install 'codefend\[parquet\]'"):
        export_rows(evaluated, tmp_path / "r.parquet")
    assert list(tmp_path.iterdir()) == []


def test_leaderboard_page_ranks_several_runs_and_states_the_rules(evaluated: Path, tmp_path: Path) -> None:
    other, unlike = copy_run(evaluated, tmp_path / "other"), copy_run(evaluated, tmp_path / "unlike")
    config = json.loads((unlike / "config.json").read_text())
    (unlike / "config.json").write_text(json.dumps(config | {"seed": 5}))
    rewrite_rows(other, {"defense": "newcomer"})
    page = write_leaderboard([evaluated, evaluated, other, unlike], tmp_path / "board.html").read_text()
    text = (tmp_path / "board.md").read_text()
    read = Page(page)
    assert read.open == []
    assert read.addresses == []
    assert text.count("\n## questions: vqa_accuracy at 8/255") == 2  # one for each set of conditions
    first = text.split("\n## ")[1]
    assert re.search(r"\| 1 \| (smooth|newcomer) \|", first)
    assert "newcomer" in first
    assert "newcomer" not in text.split("\n## ")[3]
    assert "seed 5" in text
    gap = next(line for line in first.splitlines() if line.startswith("| questions | T2 | 8/255 | leaky |"))
    assert re.search(r"\| [01]\.\d\d \[.*\] \| 6 \| (yes|no) \|$", gap)
    assert gap.split(" | ")[4] in read.text
    for rule in ("Ranked by the worst case", "other conditions make another table", "T2: adaptive white-box"):
        assert rule in read.text
        assert rule in text
    with pytest.raises(CodefendError, match="name the run folders"):
        write_leaderboard([], tmp_path / "board.html")


def test_runs_with_the_same_defense_keep_both(evaluated: Path, tmp_path: Path) -> None:
    twin = copy_run(evaluated, tmp_path / "twin")
    merged = merge([read_report(evaluated), read_report(twin)])
    names = {row["defense"] for row in merged.rows}
    assert {"leaky", "leaky (twin)", "none"} <= names
    assert "none (twin)" not in names
    assert len({(row["defense"], row["key"]) for row in merged.rows}) == len(merged.rows)


def test_runs_whose_folders_share_a_name_have_distinct_names(evaluated: Path, tmp_path: Path) -> None:
    runs = [evaluated, *(copy_run(evaluated, tmp_path / parent / "eval") for parent in ("x", "y"))]
    merged = merge([read_report(run) for run in runs])
    assert {"leaky", "leaky (eval)", "leaky (y/eval)"} <= {row["defense"] for row in merged.rows}
    assert len({(row["defense"], row["key"]) for row in merged.rows}) == len(merged.rows)


@pytest.mark.parametrize("key", ["target", "surrogate"])
def test_other_targets_and_surrogates_are_other_conditions(key: str) -> None:
    assert conditions({"seed": 0, key: "a"}) != conditions({"seed": 0, key: "b"})


def test_markdown_tables_are_rectangular(evaluated: Path) -> None:
    text = markdown_text(read_report(evaluated))
    assert text.count("\n## ") >= 7
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


def printed(show: Callable[[Path, Console], None], run: Path, width: int) -> str:
    console = Console(record=True, width=width, file=io.StringIO())
    show(run, console)
    return console.export_text()


def test_terminal_summary(evaluated: Path) -> None:
    text = printed(print_summary, evaluated, 200)
    assert "questions: vqa_accuracy at 8/255" in text
    assert "worst case" in text
    assert "too few examples" in text


def test_a_narrow_terminal_has_no_table_of_all_figures(evaluated: Path) -> None:
    text = printed(print_summary, evaluated, 80)
    assert "all figures" not in text
    assert "too few examples" in text
    assert "all figures" in printed(print_summary, evaluated, 120)


def test_overview_fits_a_narrow_terminal(evaluated: Path) -> None:
    text = printed(print_overview, evaluated, 80)
    assert "0.00 n=6" in text
    assert "T2: adaptive" in text
    assert overview(read_report(evaluated)).columns == (
        "defense",
        *("questions clean", "questions T0", "questions T2"),
        *("captions clean", "captions T0", "captions T2"),
    )


def test_panels_show_the_judged_images(evaluated: Path) -> None:
    examples = panels(read_report(evaluated))
    assert [panel.task for panel in examples] == ["questions", "captions"]
    strips = {strip.title: strip for strip in examples[0].strips}
    clean = strips["no attack"].images
    assert [image.caption for image in clean] == ["clean", "after smooth", "after leaky", "after jitter"]
    assert all(image.right for image in clean)
    oblivious = strips["T0: apgd at 8/255 through the undefended victim"].images
    assert [image.caption for image in oblivious[:3]] == ["attacked", "difference x8", "after smooth"]
    assert [image.right for image in oblivious[:4]] == [False, None, True, True]
    adaptive = strips["T2: apgd at 8/255 through leaky"].images
    assert [image.right for image in adaptive] == [None, None, False]
    assert images.load(oblivious[0].url).pixels.shape == (3, 96, 96)  # 16 pixels, enlarged


def test_plot_has_a_line_per_defense_and_a_panel_per_threat(evaluated: Path) -> None:
    svg = score_against_eps(read_report(evaluated).entries, "questions")
    assert all(word in svg for word in ("undefended", "smooth", "T0, worst case", "T2, worst case", "eps (1/255)"))
    assert score_against_eps([e for e in read_report(evaluated).entries if e.group.attack == CLEAN], "questions") == ""
