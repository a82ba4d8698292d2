"""Reports of runs that are unfinished, hostile, damaged or none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from codefend.bench.report import read_report, write_report
from codefend.bench.report.panels import panels
from codefend.core import images
from codefend.types import CodefendError
from report_kit import Page, copy_run, rewrite_rows

pytestmark = pytest.mark.usefixtures("few_samples")


def test_answers_under_attack_are_text_and_not_markup(evaluated: Path, tmp_path: Path) -> None:
    run = copy_run(evaluated, tmp_path / "run")
    evil = "<script>alert(1)</script> | **x** [red]"
    rewrite_rows(run, {"answer": evil, "prompt": evil})
    page = write_report(run).read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_images_outside_the_folder_are_not_read(evaluated: Path, tmp_path: Path) -> None:
    run = copy_run(evaluated, tmp_path / "run")
    images.save(tmp_path / "secret.png", torch.zeros(3, 8, 8))
    outside = {"clean": "../secret.png", "attacked": str(tmp_path / "secret.png"), "purified": "../secret.png"}
    rewrite_rows(run, {"pictures": outside})
    assert panels(read_report(run)) == []
    assert "not selected by outcome" not in Page(write_report(run).read_text()).text


def test_missing_images_leave_a_note(evaluated: Path, tmp_path: Path) -> None:
    run = copy_run(evaluated, tmp_path / "run")
    for path in run.glob("panels/**/*attacked.png"):
        path.write_bytes(b"torn")
    assert any(strip.title.endswith("the image is missing") for strip in panels(read_report(run))[0].strips)


def test_the_report_of_an_unfinished_run_says_so(evaluated: Path, tmp_path: Path) -> None:
    run = copy_run(evaluated, tmp_path / "run")
    lines = (run / "rows.jsonl").read_text().splitlines(keepends=True)
    (run / "rows.jsonl").write_text("".join(lines[:50]))
    assert f"Unfinished: {len(lines) - 50} rows" in write_report(run).read_text()
    assert "Unfinished" in (run / "report.md").read_text()


def test_folders_that_are_no_evaluation(evaluated: Path, tmp_path: Path) -> None:
    with pytest.raises(CodefendError, match="not a run folder"):
        write_report(tmp_path)
    with pytest.raises(CodefendError, match="not a run folder"):
        write_report(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CodefendError, match="holds no evaluation"):
        write_report(tmp_path)
    run = copy_run(evaluated, tmp_path / "run")
    (run / "bench.json").write_text("{")
    with pytest.raises(CodefendError, match="damaged"):
        write_report(run)
    (run / "rows.jsonl").write_text('{"key": 1, "loss": 2}\n')
    with pytest.raises(CodefendError, match="something else"):
        write_report(run)
    (run / "rows.jsonl").write_text("")
    with pytest.raises(CodefendError, match="no results yet"):
        write_report(run)
