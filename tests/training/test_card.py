"""Model cards: the curve, the attacks of the banks, and results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from codefend.training import train
from codefend.training.card import add_results, curve, refresh
from codefend.types import CodefendError
from training_kit import peer_config, small_bank, small_prior

if TYPE_CHECKING:
    pass


@pytest.fixture
def prior(tmp_path: Path) -> Path:
    return small_prior(tmp_path / "prior")


@pytest.fixture
def bank(tmp_path: Path) -> Path:
    return small_bank(tmp_path / "bank")


def test_a_curve_is_the_means_of_its_intervals() -> None:
    rows = [{"step": i, "loss": float(i), "mined": True} for i in range(1, 11)] + [{"key": "ground-0", "loss": 9.0}]
    assert curve(rows, points=2) == [{"step": 5, "loss": 3.0}, {"step": 10, "loss": 8.0}]
    assert curve([], points=2) == []


def test_a_card_names_no_folders_of_the_machine(prior: Path, bank: Path, tmp_path: Path) -> None:
    folder = train(peer_config("flowpure", prior, f"{bank},{bank}", steps=1), tmp_path / "run")
    text = (folder / "training.json").read_text() + (folder / "README.md").read_text()
    assert str(tmp_path) not in text
    assert f"prior={tmp_path.name}/prior" in text
    assert "drawn 2 times as often" in text
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text("lost")
    assert refresh(folder).read_text() == card
    with pytest.raises(CodefendError, match=r"training\.json"):
        refresh(bank)


def test_a_card_names_the_steps_that_each_kind_of_pairs_had(prior: Path, bank: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (bank / "rows.jsonl").read_text().splitlines()]
    rows[1] |= {"kind": "answers", "steps": 7}
    (bank / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = train(peer_config("flowpure", prior, bank, steps=1), tmp_path / "run")
    known = (
        "PGD-3 on features on lite2 (4 pairs, 4.0 to 4.0/255)",
        "PGD-7 on answers on pocket (4 pairs, 8.0 to 8.0/255)",
    )
    card = (folder / "README.md").read_text()
    assert all(words in card for words in known)
    training = json.loads((folder / "training.json").read_text())  # as in cards from before steps were recorded
    training["pairs"][0]["config"]["answer_steps"] = 7
    for group in training["pairs"][0]["made"]:
        del group["steps"]
    (folder / "training.json").write_text(json.dumps(training))
    assert refresh(folder).read_text() == card


def test_results_are_those_of_the_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import toys
    from codefend.bench import EvalConfig, evaluate
    from codefend.cli import main

    tasks = EvalConfig(tasks=("questions",), defenses=("none", "smooth"), attacks=("pgd",), steps=3, limit=6, panels=0)
    evaluate(tasks, tmp_path / "eval", loaders=toys.loaders())
    (tmp_path / "README.md").write_text("# smooth\n")
    assert main(["card", str(tmp_path), str(tmp_path / "eval"), "--defense", "smooth"]) == 0
    card = (tmp_path / "README.md").read_text()
    assert "| questions | clean | none |  | vqa_accuracy 1.000" in card
    assert "| questions | T2 | pgd | 8/255 | vqa_accuracy 1.000 [1.000, 1.000] | 100% | 6 |" in card
    assert "none |  | vqa_accuracy 0" not in card  # the bare victim's lines stay out
    assert main(["card", str(tmp_path), str(tmp_path / "eval")]) == 2
    assert "no rows of defense" in capsys.readouterr().err


def test_results_replace_earlier_ones(tmp_path: Path) -> None:
    with pytest.raises(CodefendError, match=r"no README\.md"):
        add_results(tmp_path, "x", "runs/eval")
    (tmp_path / "README.md").write_text("# mine\n\nWhat it is.\n")
    add_results(tmp_path, "| old |", "runs/a")
    path = add_results(tmp_path, "| new |", "runs/b")
    assert path.read_text() == "# mine\n\nWhat it is.\n\n## Results\n\n`runs/b`\n\n| new |\n"
