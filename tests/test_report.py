"""Reports of toy runs: the figures are right, the file is whole, and nothing an attacker writes becomes markup."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from rich.console import Console

import toys
from codefend import images
from codefend import results as results_module
from codefend.evaluate import EvalConfig, evaluate
from codefend.report import (
    export_rows,
    print_overview,
    print_summary,
    read_report,
    write_leaderboard,
    write_report,
)
from codefend.report.attacks import seen_and_unseen, success
from codefend.report.board import merge
from codefend.report.exports import csv_text, markdown_text
from codefend.report.panels import panels
from codefend.report.plots import score_against_eps
from codefend.report.tables import flags_of, leaderboard, number, overview, rate, results
from codefend.results import (
    CLEAN,
    WORST,
    Group,
    Rate,
    eps_label,
    gaps,
    gate,
    group_of,
    grouped,
    paired,
    scores,
    strongest,
    success_rates,
    summarize,
    worst_rows,
)
from codefend.runs import Row
from codefend.sanity import Flag
from codefend.types import UserError

CONFIG = EvalConfig(
    victim="toy",
    tasks=("questions", "captions"),
    defenses=("none", "smooth", "leaky", "jitter"),
    attacks=("apgd", "apgd-targeted"),
    eps=(2.0, 8.0),
    steps=12,
    batch=12,
    limit=6,
    resubmissions=2,
    adaptive=("leaky", "smooth"),
    panels=1,
)


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    before, results_module.SAMPLES = results_module.SAMPLES, 50
    yield
    results_module.SAMPLES = before


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("report") / "run"
    evaluate(CONFIG, run, loaders=toys.loaders())
    return run


@pytest.fixture(scope="module")
def page(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_report(folder, tmp_path_factory.mktemp("out") / "r.html").read_text()


def texts(table: list[tuple[str, ...]] | tuple[tuple[str, ...], ...], column: int) -> list[str]:
    return [line[column] for line in table]


# The figures


def test_leaderboard_ranks_by_the_adaptive_worst_case(folder: Path) -> None:
    table = leaderboard(read_report(folder), "questions")
    assert table.title == "questions: vqa_accuracy at 8/255"
    assert table.columns == ("rank", "defense", "clean", "T0 worst case", "T2 worst case", "kept", "doubts")
    assert texts(table.lines, 1)[0] == "smooth"
    assert set(texts(table.lines, 1)[1:3]) == {"leaky", "none"}
    last = table.lines[-1]  # attacked at T0 only: no rank, whatever its score
    assert (last[0], last[1], last[4], last[-1]) == ("–", "jitter", "–", "not attacked through itself")


def test_results_have_every_figure_with_denominators(folder: Path) -> None:
    report = read_report(folder)
    table = results(report, "questions")
    assert len(table.lines) == sum(entry.group.task == "questions" for entry in report.entries)
    leaky = next(line for line in table.lines if line[:4] == ("leaky", "T2", "apgd", "8/255"))
    cells = dict(zip(table.columns, leaky, strict=True))
    assert cells["score"].startswith("0.00 [")
    assert (cells["n"], cells["kept"], cells["broken"], cells["target"]) == ("6", "0%", "6/6 (100%)", "–")
    targeted = next(line for line in table.lines if line[:4] == ("none", "T0", "apgd-targeted", "8/255"))
    assert re.fullmatch(r"\d/\d \(\d+%\)", targeted[table.columns.index("target")])
    assert len(results(report, "questions", brief=True).lines) < len(table.lines)


def test_worst_case_takes_each_examples_lowest_score_and_every_weaker_threat(folder: Path) -> None:
    groups = grouped(read_report(folder).rows)
    for group, rows in worst_rows(groups).items():
        for row in rows:
            rivals = [
                float(other["worst_scores"][other["headline"]])
                for key, found in groups.items()
                for other in found
                if key.attack != CLEAN
                and (key.task, key.defense, key.eps) == (group.task, group.defense, group.eps)
                and other["example"] == row["example"]
                and (key.threat == "T0" or group.threat == "T2")
            ]
            assert row["worst_scores"][row["headline"]] == min(rivals)


def made(example: int, score: float | None, **changes: object) -> Row:
    row: Row = {"task": "t", "defense": "d", "threat": "T0", "attack": "a", "eps": 0.1, "norm": "l2", "headline": "m"}
    row |= {"example": str(example), "image": str(example), "resubmissions": 1, "success": {}, "success_any": {}}
    row |= {key: {"m": score} for key in ("scores", "mean_scores", "worst_scores", "vote_scores")}
    return row | changes


def test_worst_case_leaves_out_examples_that_not_every_attack_reached() -> None:
    rows = [made(0, 1.0), made(1, 1.0), made(0, 0.0, attack="b")]
    found = worst_rows(grouped(rows))
    assert [(g.attack, [r["example"] for r in chosen]) for g, chosen in found.items()] == [(WORST, ["0"])]
    assert next(iter(found.values()))[0]["attack"] == "b"


def test_unscored_is_not_zero() -> None:
    (entry, worst) = summarize([made(0, None), made(1, 1.0)])
    assert entry.score.mean == worst.score.mean == 1.0
    assert entry.score.n == 1


def test_share_kept_is_of_the_undefended_clean_score() -> None:
    clean = [made(i, 0.8, defense="none", threat="clean", attack=CLEAN, eps=0.0) for i in range(3)]
    blunted = [made(i, 0.4, threat="clean", attack=CLEAN, eps=0.0) for i in range(3)]
    attacked = [made(i, 0.2) for i in range(2)]
    kept = {entry.group.attack + entry.group.defense: entry.kept for entry in summarize(clean + blunted + attacked)}
    assert kept[f"{CLEAN}d"] == pytest.approx(0.5)
    assert kept["ad"] == pytest.approx(0.25)


def fell(example: int, untargeted: int | None, targeted: int | None = None, **changes: object) -> Row:
    found = {"untargeted": untargeted} | ({} if targeted is None else {"targeted": targeted})
    return made(example, 0.0, success_any=found, **changes)


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


def test_success_table_names_what_max_asr_reads(folder: Path) -> None:
    table = success(read_report(folder))
    cells = {line[:4]: line[4:] for line in table.lines}
    assert cells["questions", "leaky", "T2", "8/255"][::2] == ("6/6 (100%)", "yes")
    assert cells["questions", "leaky", "T0", "8/255"][2] == ""
    assert cells["questions", "jitter", "T0", "8/255"][2] == "yes"  # it was never attacked through itself
    assert cells["questions", "none", "T0", "8/255"][1] == "–"  # nothing there that could be suspicious


def test_a_gate_refuses_what_is_more_suspicious_than_clean_pictures() -> None:
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


def test_seen_and_unseen_attacks_are_compared_on_the_same_examples(folder: Path) -> None:
    report = read_report(folder)
    assert seen_and_unseen(report).lines == ()
    marked = replace(report, config=report.config | {"seen": ["apgd-targeted"]})
    table = seen_and_unseen(marked)
    line = next(line for line in table.lines if line[:4] == ("questions", "leaky", "T2", "8/255"))
    assert line[5].startswith("0.00")
    assert line[7] == "6"
    assert "seen in training: apgd-targeted; unseen: apgd" in table.notes[0]
    rows = [made(0, 1.0, access="score"), made(1, 1.0, access="score")]
    rows += [made(0, 0.0, attack="new", access="score"), made(2, 0.0, attack="new", access="score")]
    lines = seen_and_unseen(replace(report, config={"seen": ["a"]}, rows=rows)).lines
    assert [(line[4], line[5], line[6], line[7]) for line in lines] == [("1.00", "0.00", "1.00", "1")]


def test_resubmissions_are_shown_with_worst_case_and_vote(folder: Path) -> None:
    table = results(read_report(folder), "questions")
    assert table.columns[7:9] == ("worst of 2", "vote of 2")
    jitter = next(line for line in table.lines if line[:4] == ("jitter", "T0", "apgd", "8/255"))
    assert all(cell.endswith(" n=6") for cell in jitter[7:9])
    assert next(line for line in table.lines if line[0] == "leaky")[7:9] == ("–", "–")


def test_paired_gap_to_the_best() -> None:
    rows = [made(i, 1.0, defense="good") for i in range(5)] + [made(i, float(i == 0)) for i in range(5)]
    ((group, gap),) = gaps(grouped(rows)).items()
    assert group.defense == "d"
    assert gap.mean == pytest.approx(0.8)
    assert gap.low > 0
    assert [a["example"] for a, _ in paired(rows[:3], rows[5:7])] == ["0", "1"]


def test_a_worst_case_inherits_the_doubts_about_its_attacks() -> None:
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


# The files


class Page(HTMLParser):
    """Collects tags, addresses and text; complains about tags that aren't closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page_is_whole_and_needs_no_network(page: str) -> None:
    read = Page(page)
    assert read.open == []
    assert read.addresses
    assert all(address.startswith("data:image/") for address in read.addresses)
    assert not {"script", "link", "iframe"} & set(read.tags)
    for heading in ("Leaderboard", "Score against the size of the attack", "Doubts", "Pictures", "Cost", "Settings"):
        assert heading in read.text
    assert "Unfinished" not in read.text
    assert "6 examples: the 95% interval" in read.text


def test_same_rows_make_the_same_files(folder: Path, page: str, tmp_path: Path) -> None:
    assert write_report(folder, tmp_path / "again.html").read_text() == page
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.csv", "again.html", "again.md"]


def test_report_lies_in_the_run_folder_unless_told(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    assert write_report(copy) == copy / "report.html"
    assert write_report(copy, tmp_path) == tmp_path / "report.html"


def test_csv_has_unrounded_numbers(folder: Path) -> None:
    report = read_report(folder)
    lines = list(csv.DictReader(io.StringIO(csv_text(report))))
    assert len(lines) == len(report.entries)
    first = lines[0]
    assert float(first["score"]) == report.entries[0].score.mean
    assert float(first["mean_exact_match"]) == 1
    assert first["mean_cider_d"] == ""  # not a metric of this task
    attacked = next(line for line in lines if line["defense"] == "leaky" and line["threat"] == "T2")
    assert float(attacked["eps"]) == pytest.approx(2 / 255)


def test_rows_as_flat_tables(folder: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = read_report(folder).rows
    lines = list(csv.DictReader(io.StringIO(export_rows(folder, tmp_path / "r.csv").read_text())))
    table = parquet.read_table(export_rows(folder, tmp_path / "r.parquet")).to_pylist()
    assert len(lines) == len(table) == len(rows)
    for line, cells, row in zip(lines, table, rows, strict=True):
        assert line["key"] == cells["key"] == row["key"]
        assert cells["scores.exact_match"] == row["scores"].get("exact_match")
        assert json.loads(cells["references"]) == row["references"]
        assert line["budget.steps"] == ("" if row["attack"] == CLEAN else "12")


def test_rows_go_to_known_endings_only(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"written as .csv or .parquet"):
        export_rows(folder, tmp_path / "r.xlsx")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install 'codefend\[parquet\]'"):
        export_rows(folder, tmp_path / "r.parquet")
    assert list(tmp_path.iterdir()) == []


def test_leaderboard_page_ranks_several_runs_and_states_the_rules(folder: Path, tmp_path: Path) -> None:
    other, unlike = copied(folder, tmp_path / "other"), copied(folder, tmp_path / "unlike")
    config = json.loads((unlike / "config.json").read_text())
    (unlike / "config.json").write_text(json.dumps(config | {"seed": 5}))
    rewrite(other, {"defense": "newcomer"})
    page = write_leaderboard([folder, folder, other, unlike], tmp_path / "board.html").read_text()
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
    for rule in ("Ranked by the worst case", "other conditions make another table", "T2: white box"):
        assert rule in read.text
        assert rule in text
    with pytest.raises(UserError, match="name the run folders"):
        write_leaderboard([], tmp_path / "board.html")


def test_runs_with_the_same_defense_keep_both(folder: Path, tmp_path: Path) -> None:
    twin = copied(folder, tmp_path / "twin")
    merged = merge([read_report(folder), read_report(twin)])
    names = {row["defense"] for row in merged.rows}
    assert {"leaky", "leaky (twin)", "none"} <= names
    assert "none (twin)" not in names
    assert len({(row["defense"], row["key"]) for row in merged.rows}) == len(merged.rows)


def test_markdown_tables_are_rectangular(folder: Path) -> None:
    text = markdown_text(read_report(folder))
    assert text.count("\n## ") >= 7
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


def test_terminal_summary(folder: Path) -> None:
    console = Console(record=True, width=200, file=io.StringIO())
    print_summary(folder, console)
    shown = console.export_text()
    assert "questions: vqa_accuracy at 8/255" in shown
    assert "worst case" in shown
    assert "too few examples" in shown


def test_overview_fits_a_narrow_terminal(folder: Path) -> None:
    console = Console(record=True, width=80, file=io.StringIO())
    print_overview(folder, console)
    shown = console.export_text()
    assert "0.00 n=6" in shown
    assert "T2: white box" in shown
    assert overview(read_report(folder)).columns == (
        "defense",
        *("questions clean", "questions T0", "questions T2"),
        *("captions clean", "captions T0", "captions T2"),
    )


def test_panels_show_what_was_judged(folder: Path) -> None:
    found = panels(read_report(folder))
    assert [panel.task for panel in found] == ["questions", "captions"]
    strips = {strip.title: strip for strip in found[0].strips}
    clean = strips["nobody attacks"].pictures
    assert [picture.caption for picture in clean] == ["clean", "after smooth", "after leaky", "after jitter"]
    assert all(picture.right for picture in clean)
    oblivious = strips["T0: apgd at 8/255 through the bare victim"].pictures
    assert [picture.caption for picture in oblivious[:3]] == ["attacked", "difference x8", "after smooth"]
    assert [picture.right for picture in oblivious[:4]] == [False, None, True, True]
    adaptive = strips["T2: apgd at 8/255 through leaky"].pictures
    assert [picture.right for picture in adaptive] == [None, None, False]
    assert images.load(oblivious[0].url).pixels.shape == (3, 96, 96)  # 16 pixels, enlarged to be seen


def test_plot_has_a_line_per_defense_and_a_panel_per_threat(folder: Path) -> None:
    svg = score_against_eps(read_report(folder).entries, "questions")
    assert all(word in svg for word in ("undefended", "smooth", "T0, worst case", "T2, worst case", "eps (1/255)"))
    assert score_against_eps([e for e in read_report(folder).entries if e.group.attack == CLEAN], "questions") == ""


# Trouble


def copied(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def rewrite(folder: Path, change: dict[str, object]) -> None:
    path = folder / "rows.jsonl"
    rows = [json.loads(line) | change for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_answers_under_attack_are_text_and_not_markup(folder: Path, tmp_path: Path) -> None:
    run = copied(folder, tmp_path / "run")
    evil = "<script>alert(1)</script> | **x** [red]"
    rewrite(run, {"answer": evil, "prompt": evil})
    page = write_report(run).read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_pictures_outside_the_folder_are_not_read(folder: Path, tmp_path: Path) -> None:
    run = copied(folder, tmp_path / "run")
    images.save(tmp_path / "secret.png", torch.zeros(3, 8, 8))
    outside = {"clean": "../secret.png", "attacked": str(tmp_path / "secret.png"), "purified": "../secret.png"}
    rewrite(run, {"pictures": outside})
    assert panels(read_report(run)) == []
    assert "Pictures" not in Page(write_report(run).read_text()).text


def test_lost_pictures_leave_a_note(folder: Path, tmp_path: Path) -> None:
    run = copied(folder, tmp_path / "run")
    for path in run.glob("panels/**/*attacked.png"):
        path.write_bytes(b"torn")
    assert any(strip.title.endswith("the picture is gone") for strip in panels(read_report(run))[0].strips)


def test_unfinished_run_says_so(folder: Path, tmp_path: Path) -> None:
    run = copied(folder, tmp_path / "run")
    lines = (run / "rows.jsonl").read_text().splitlines(keepends=True)
    (run / "rows.jsonl").write_text("".join(lines[:50]))
    assert f"Unfinished: {len(lines) - 50} rows" in write_report(run).read_text()
    assert "Unfinished" in (run / "report.md").read_text()


def test_folders_that_are_no_evaluation(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run folder"):
        write_report(tmp_path)
    with pytest.raises(UserError, match="not a run folder"):
        write_report(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="holds no evaluation"):
        write_report(tmp_path)
    run = copied(folder, tmp_path / "run")
    (run / "bench.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        write_report(run)
    (run / "rows.jsonl").write_text('{"key": 1, "loss": 2}\n')
    with pytest.raises(UserError, match="something else"):
        write_report(run)
    (run / "rows.jsonl").write_text("")
    with pytest.raises(UserError, match="no results yet"):
        write_report(run)


def test_group_of_a_row_and_scores_of_many() -> None:
    row = made(0, 0.5)
    assert group_of(row) == Group("t", "d", "T0", "a", 0.1)
    assert scores([row, made(1, None)]).isnan().tolist() == [False, True]
