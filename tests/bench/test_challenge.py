"""The challenge: frozen images, the rules of a submission, and its score."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import toys
from codefend.bench.challenge import ChallengeConfig, score_submission, write_challenge
from codefend.core import images
from codefend.core.specs import split_specs
from codefend.tasks.metrics import exact_match
from codefend.types import CodefendError, Task

TASKS, DEFENSES = ("questions",), ("jitter", "smooth")
CONFIG = ChallengeConfig(victim="toy", tasks=TASKS, defenses=DEFENSES, eps=(8.0,), limit=6, draws=2)
CLAIM = {"name": "mine", "attack": "a checkerboard", "defense": "jitter", "threat": "T2", "eps": 8}


@pytest.fixture
def challenge(tmp_path: Path) -> Path:
    return write_challenge(CONFIG, tmp_path / "challenge", toys.loaders())


def submit(challenge: Path, folder: Path, *, levels: int = 8, count: int = 6, **changes: object) -> Path:
    """Add a checkerboard that reads as red to the first images."""
    for path in sorted((challenge / "images" / "questions").glob("*.png"))[:count]:
        clean = images.load(path).pixels
        pattern = toys.checkerboard(clean) * torch.tensor([1, -1, -1])[:, None, None] * levels / 255
        images.save(folder / "images" / "questions" / path.name, (clean + pattern).clamp(0, 1))
    folder.mkdir(exist_ok=True)
    (folder / "submission.json").write_text(json.dumps({**CLAIM, **changes}))
    return folder


def test_a_submission_is_judged_behind_its_defense(challenge: Path, tmp_path: Path) -> None:
    unchanged = score_submission(challenge, submit(challenge, tmp_path / "a", levels=0), seed=1, loaders=toys.loaders())
    attacked = score_submission(challenge, submit(challenge, tmp_path / "b"), seed=1, loaders=toys.loaders())
    smooth = submit(challenge, tmp_path / "c", defense="smooth")
    restored = score_submission(challenge, smooth, seed=1, loaders=toys.loaders())
    values = [result["rows"][0]["value"] for result in (unchanged, attacked, restored)]
    assert values[1] < values[0] == values[2] == 1
    assert attacked["rows"][0]["id"] == "jitter/T2/mine/8/questions"
    assert json.loads((tmp_path / "b" / "score.json").read_text()) == attacked
    again = score_submission(challenge, tmp_path / "b", seed=1, loaders=toys.loaders())
    assert again["rows"] == attacked["rows"]


def test_a_task_without_labels_is_judged_by_the_clean_answers(tmp_path: Path) -> None:
    """As evaluations judge it; the scores of an answer without references are nan, which JSON does not have."""
    labelled = toys.task("questions", "test", 6)
    task = Task(
        "questions", [replace(e, references=()) for e in labelled.examples], {"agreement": exact_match}, "agreement", ""
    )
    loaders = replace(toys.loaders(), task=lambda *arguments: task)
    folder = write_challenge(CONFIG, tmp_path / "challenge", loaders)
    score = score_submission(folder, submit(folder, tmp_path / "a", levels=0), seed=1, loaders=loaders)
    assert score["rows"][0]["value"] == 1


def test_missing_images_count_as_unchanged(challenge: Path, tmp_path: Path) -> None:
    few = score_submission(challenge, submit(challenge, tmp_path / "a", count=1), seed=1, loaders=toys.loaders())
    many = score_submission(challenge, submit(challenge, tmp_path / "b"), seed=1, loaders=toys.loaders())
    assert few["rows"][0]["changed"] == 1
    assert few["rows"][0]["value"] > many["rows"][0]["value"]
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "submission.json").write_text(json.dumps(CLAIM))
    with pytest.raises(CodefendError, match="no image"):
        score_submission(challenge, tmp_path / "none", loaders=toys.loaders())


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"defense": "bridge"}, "defense must be one of"),
        ({"threat": "T9"}, "threat must be one of"),
        ({"eps": 16}, "eps must be one of"),
        ({"eps": "many"}, "name, attack"),
        ({"name": "../x"}, "name must be"),
        ({"more": 1}, "no more"),
    ],
)
def test_a_claim_against_the_rules_is_refused(
    challenge: Path, tmp_path: Path, changes: dict[str, object], problem: str
) -> None:
    with pytest.raises(CodefendError, match=problem):
        score_submission(challenge, submit(challenge, tmp_path / "s", **changes), loaders=toys.loaders())


def test_an_image_over_the_budget_or_of_another_size_is_refused(challenge: Path, tmp_path: Path) -> None:
    with pytest.raises(CodefendError, match="9/255"):
        score_submission(challenge, submit(challenge, tmp_path / "a", levels=9), loaders=toys.loaders())
    folder = submit(challenge, tmp_path / "b")
    path = next((folder / "images" / "questions").glob("*.png"))
    images.save(path, images.load(path).pixels[:, :8])
    with pytest.raises(CodefendError, match="size"):
        score_submission(challenge, folder, loaders=toys.loaders())


def test_changed_images_of_the_task_and_a_used_folder_are_refused(challenge: Path, tmp_path: Path) -> None:
    manifest = json.loads((challenge / "challenge.json").read_text())
    manifest["examples"][0]["sha256"] = "0" * 64
    (challenge / "challenge.json").write_text(json.dumps(manifest))
    with pytest.raises(CodefendError, match="other images"):
        score_submission(challenge, submit(challenge, tmp_path / "s"), loaders=toys.loaders())
    with pytest.raises(CodefendError, match="not empty"):
        write_challenge(CONFIG, challenge, toys.loaders())


def test_the_command_checks_its_settings(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    assert run("challenge", "write", tmp_path / "c", "--set", "eps=2", "--dry-run")[0] == 0
    code, _, err = run("challenge", "write", tmp_path / "c", "--set", "eps=0.03")
    assert code == 2
    assert "1/255" in err
    code, _, err = run("challenge", "score", tmp_path / "c", tmp_path)
    assert code == 2
    assert "challenge.json" in err
    assert not (tmp_path / "c").exists()
    assert split_specs(CONFIG.defenses) == ("jitter", "smooth")
