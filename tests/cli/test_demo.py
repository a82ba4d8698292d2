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
from codefend.cli.demo import ADAPTIVE, DEMO, PHOTOGRAPH, adaptive_verdict, run_demo, verdict
from codefend.types import CodefendError

TOY = replace(
    DEMO,
    victim="toy",
    tasks=("questions", "captions"),
    defenses=("none", "leaky"),
    limit=4,
    panels=1,
)
TOY_ADAPTIVE = replace(ADAPTIVE, victim="toy", tasks=("captions",), defenses=("leaky",), attacks=("apgd",), limit=4)
TOY_PHOTOGRAPH = replace(PHOTOGRAPH, victim="toy", tasks=("captions",), defenses=("none", "leaky"))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "SAMPLES", 50)


def run(folder: Path, config: EvalConfig = TOY, victim: object = None) -> tuple[int, str]:
    console = Console(file=io.StringIO(), record=True, width=160)
    code = run_demo(
        folder,
        config=config,
        adaptive=TOY_ADAPTIVE,
        photograph=TOY_PHOTOGRAPH,
        defense="leaky",
        loaders=toys.loaders(victim),
        console=console,
    )
    return code, console.export_text()


def test_a_working_defense_passes(tmp_path: Path) -> None:
    code, output = run(tmp_path)
    assert code == 0
    works, adaptive = output.strip().splitlines()[-2:]
    assert works.startswith("CoDefend works on this machine: under an oblivious attack the undefended model keeps ")
    assert works.endswith("and with leaky 100% (4 of task questions and 4 of task captions).")
    assert adaptive.startswith("An attacker who knows leaky: at 2/255 it ")
    assert "at 8/255 it is broken (0% of its clean score is left)" in adaptive
    for state in ("clean image, undefended: ", "clean image, with leaky: ", "attacked at 4/255, with leaky: "):
        assert f"   {state}" in output
    assert (tmp_path / "report.html").is_file()
    assert (tmp_path / "adaptive" / "report.html").is_file()
    assert run(tmp_path) == (code, output)  # again, from the rows


def test_a_defense_without_effect_fails(tmp_path: Path) -> None:
    config = replace(TOY, defenses=("none", "rounded"))
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


def test_each_radius_says_what_was_measured(tmp_path: Path) -> None:
    rows = evaluate(replace(TOY_ADAPTIVE, defenses=("smooth",)), tmp_path, loaders=toys.loaders())
    assert adaptive_verdict(rows, "smooth").startswith(
        "An attacker who knows smooth: at 2/255 it holds (100% of its clean score is left); "
        "at 8/255 it holds (100% of its clean score is left). "
    )


def test_demo_is_small_enough_for_two_slow_cores() -> None:
    check(DEMO)
    check(ADAPTIVE)
    assert DEMO.limit is not None
    assert ADAPTIVE.limit is not None
    gradients = len(DEMO.tasks) * DEMO.steps * DEMO.limit
    answers = len(DEMO.tasks) * 2 * DEMO.limit * len(DEMO.defenses) + ADAPTIVE.limit * (1 + len(ADAPTIVE.eps))
    cheap = len(ADAPTIVE.eps) * ADAPTIVE.steps * ADAPTIVE.eot * ADAPTIVE.limit
    assert gradients * 0.3 + answers * 0.2 + cheap * 0.07 < 150  # seconds of one core; models come on top
