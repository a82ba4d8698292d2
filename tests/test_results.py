"""Published figures: the text of README, docs and model cards is that of results/*.json."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent


def load_tool(name: str, folder: str = "tools") -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / folder / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


tool = load_tool("render_results")
FIGURES = tool.load_figures()
SHARE = FIGURES["bridge-detail/T2/words-then-loss/4/vqa"]  # any figure, to make others from


def test_pages_hold_what_the_data_say() -> None:
    outdated = [str(path.relative_to(ROOT)) for path in tool.outdated(FIGURES)]
    assert not outdated, f"python tools/render_results.py changes {', '.join(outdated)}"


@pytest.mark.parametrize("name", ["bridge/T0/seen/8/caption", "bridge/T2/words-then-loss/4/vqa"])
def test_another_value_changes_the_readme(name: str) -> None:
    changed = FIGURES | {name: replace(SHARE, id=name, value=0.77)}
    assert ROOT / "README.md" in tool.outdated(changed)


def test_the_readme_shows_the_attack_in_two_stages_once_it_was_run() -> None:
    defense = "bridge-large"
    figure = replace(SHARE, value=0.77, n=32)
    rows = {id: replace(figure, id=id) for task in tool.TASKS for id in [f"{defense}/T2/words-then-loss/4/{task}"]}
    others = {id: row for id, row in FIGURES.items() if not id.startswith(f"{defense}/")}
    marker = "<!-- results: overview -->\n<!-- /results -->"
    assert f"`{defense}`" not in tool.render(marker, others)
    assert "77% / 77% (n 32)" in tool.render(marker, others | rows)
    assert f"`{defense}` | questions | 32 |" in tool.two_stage_table(others | rows)


def test_a_weaker_attack_gives_an_upper_bound() -> None:
    weaker = {id: row for id, row in FIGURES.items() if "/words-then-loss/" not in id}
    assert tool.adaptive_cell(weaker, "bridge-detail", "2").startswith("at most ")
    assert tool.adaptive_cell(weaker, "none", "2") == "-"
    weaker["x/T2/apgd/2/vqa"] = replace(SHARE, id="x/T2/apgd/2/vqa", value=0.0, n=5)
    assert tool.adaptive_cell(weaker, "x", "2") == "- / 0% (n 5)"


def test_a_missing_figure_is_a_dash() -> None:
    figures = {"a/psnr": replace(SHARE, id="a/psnr", unit="dB", value=31.96), "a/caption": replace(SHARE, value=0.5)}
    cells = {"?b/psnr|dB": "-", "a/psnr|dB": "32.0 dB", "?b/*": "-", "?a/*|%": "50% / -"}
    assert {cell: tool.look_up(cell, figures) for cell in cells} == cells


def test_weights_that_no_longer_ship_are_no_target_of_the_challenge() -> None:
    rows = {id: replace(SHARE, id=id) for id in ("former-x/T2/words-then-loss/4/vqa", "x/T2/words-then-loss/4/vqa")}
    for table in (tool.strongest(rows), tool.two_stage_table(rows)):
        assert "`x`" in table
        assert "former-x" not in table


def test_no_line_begins_with_a_marker() -> None:
    """Markdown takes such a line for a block of its own and breaks the paragraph."""
    for path in tool.pages():
        for line in path.read_text(encoding="utf-8").splitlines():
            assert not line.lstrip(" *").startswith("<!--="), f"{path.name}: {line}"


def test_figures_are_complete() -> None:
    for figure in FIGURES.values():
        assert figure.n >= 1, figure.id
        assert figure.date.startswith("20"), figure.id
        assert figure.command or figure.note, f"{figure.id}: no command, and no note that says why"
        assert figure.unit != "share" or -1 <= figure.value <= 1, figure.id
        if figure.interval:
            assert figure.interval[0] <= figure.value <= figure.interval[1], figure.id


def test_sources_are_entries_of_the_notebook() -> None:
    for figure in FIGURES.values():
        if figure.source:
            page, _, entry = figure.source.partition(", ")
            assert f"\n## {entry}" in (ROOT / page).read_text(encoding="utf-8"), figure.source


def test_rows_without_a_command_say_so() -> None:
    path = ROOT / "results" / "cost.json"
    run = json.loads(path.read_text(encoding="utf-8"))
    run["runs"][0]["command"] = None
    assert tool.NOT_RECORDED in tool.list_runs(run, FIGURES)
    assert tool.NOT_RECORDED not in tool.list_rows(path, FIGURES)


def test_unknown_figures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no figure bridge/nothing"):
        tool.render("<!--=bridge/nothing-->.1<!--/-->", FIGURES)
    row = {"id": "a/b", "value": 1.0}
    run = {"unit": "share", "n": 1, "date": "2026", "command": "x", "source": None, "rows": [row, row]}
    (tmp_path / "twice.json").write_text(json.dumps({"runs": [run]}), encoding="utf-8")
    with pytest.raises(ValueError, match="a/b occurs twice"):
        tool.load_figures(tmp_path)


@pytest.mark.parametrize(
    ("value", "n", "low", "high"),
    [(0.5, 16, 0.28, 0.72), (0.0, 16, 0.0, 0.194), (1.0, 48, 0.926, 1.0)],  # Wilson 1927, by hand
)
def test_intervals_are_wilsons(value: float, n: int, low: float, high: float) -> None:
    figure = tool.Figure("a/b", value, "share", n, "2026", "x", None)
    assert tool.interval(figure) == pytest.approx((low, high), abs=0.003)


def test_plots_are_of_these_figures() -> None:
    plot = load_tool("plot_results")
    for name in plot.PLOTS:
        text = (ROOT / "docs" / "assets" / f"{name}.svg").read_text(encoding="utf-8")
        assert plot.digest(FIGURES) in text, "run python tools/plot_results.py"


def test_the_costs_of_an_image_are_those_of_the_measured_times(capsys: pytest.CaptureFixture[str]) -> None:
    load_tool("capacity", "benchmarks").cost(core_hour=0.04, gpu_hour=2.5, gpu_tflops=120)
    lines = capsys.readouterr().out.replace(" 0.", " .").splitlines()
    assert len(lines) == 3
    assert set(lines) <= set((ROOT / "docs" / "capacity.md").read_text(encoding="utf-8").splitlines())
