"""The demo on toys: its verdict, its exit code, and that it can be run again."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

import codefend.bench.report
import toys
from codefend.bench import EvalConfig, evaluate, results
from codefend.bench.config import check
from codefend.cli import demo
from codefend.cli.demo import DEMO, run_demo, verdict
from codefend.types import CodefendError

TOY = replace(
    DEMO,
    victim="toy",
    tasks=("questions", "captions"),
    defenses=("none", "leaky"),
    adaptive=("leaky",),
    limit=4,
    panels=1,
)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "SAMPLES", 50)


def run(folder: Path, config: EvalConfig = TOY, victim: object = None) -> tuple[int, str]:
    console = Console(file=io.StringIO(), record=True, width=160)
    code = run_demo(folder, config=config, defense="leaky", loaders=toys.loaders(victim), console=console)
    return code, console.export_text()


def test_a_working_defense_passes(tmp_path: Path) -> None:
    code, output = run(tmp_path)
    assert code == 0
    last = output.strip().splitlines()[-1]
    assert last.startswith("CoDefend works on this machine: under an oblivious attack the undefended model keeps ")
    assert last.endswith(
        "and with leaky 100% (4 of task questions and 4 of task captions); "
        "under an adaptive attack leaky keeps 0% (fewer images)."
    )
    assert "captions T2" in output
    assert (tmp_path / "report.html").is_file()
    assert run(tmp_path) == (code, output)  # again, from the rows


def test_a_defense_without_effect_fails(tmp_path: Path) -> None:
    config = replace(TOY, defenses=("none", "rounded"), adaptive=("rounded",))
    rows = evaluate(config, tmp_path, loaders=toys.loaders())
    works, sentence = verdict(rows, "rounded")
    assert not works
    assert sentence.startswith("CoDefend does not work on this machine: under an oblivious")


def test_an_attack_without_effect_is_inconclusive(tmp_path: Path) -> None:
    code, output = run(tmp_path, replace(TOY, eps=(1.0,)))
    assert code == 1
    assert "Inconclusive, because the attack is too weak" in output


def test_a_model_without_correct_answers_fails(tmp_path: Path) -> None:
    class Mute(toys.ToyVictim):
        def generate(self, images: object, prompts: object) -> list[str]:
            return [""] * len(images)  # type: ignore[arg-type]

    code, output = run(tmp_path, victim=Mute())
    assert code == 1
    assert "the model scores only 0% on clean images." in output


def test_the_verdict_does_not_need_plots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(run_dir: Path) -> Path:
        raise CodefendError("the HTML report needs matplotlib")

    monkeypatch.setattr(demo, "write_report", refuse)
    assert demo.write_report is not codefend.bench.report.write_report
    code, output = run(tmp_path)
    assert code == 0
    assert "No report: the HTML report needs matplotlib" in output


def test_demo_is_small_enough_for_two_slow_cores() -> None:
    check(DEMO)
    assert DEMO.limit is not None
    assert DEMO.adaptive_limit is not None
    gradients = len(DEMO.tasks) * DEMO.steps * (DEMO.limit + DEMO.adaptive_limit * len(DEMO.adaptive))
    answers = len(DEMO.tasks) * (2 * DEMO.limit * len(DEMO.defenses) + DEMO.adaptive_limit * len(DEMO.adaptive))
    assert gradients * 0.3 + answers * 0.2 < 150  # seconds; models and purifiers come on top, five minutes are promised
