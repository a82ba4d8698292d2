"""Answers by vote: which answer wins, the defended victim that votes, its spec, and its rows in an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import toys
from codefend import Defense, EvalConfig, evaluate
from codefend.core.specs import parse_spec
from codefend.core.votes import elect
from codefend.defense import DefendedVictim
from codefend.purifiers.shallow import Identity
from codefend.types import CodefendError


@pytest.mark.parametrize(
    ("answers", "winner"),
    [
        (["red", "blue", "Blue."], 1),
        (["red", "blue"], 0),
        (["a bottom left", "top left", "The bottom left!"], 0),
        (["a cat", "a red car and a dog", "a car and a dog in front of it", "a red car and a dog"], 1),
        (["one", "", ""], 1),
    ],
)
def test_the_answer_wins_that_most_others_are_like(answers: Sequence[str], winner: int) -> None:
    assert elect(answers) == winner


class Reader:
    """Reads one noisy pixel, so that a single answer is wrong quite often."""

    name, greedy = "reader", True
    calls = 0

    def generate(self, images: torch.Tensor, prompts: Sequence[str]) -> list[str]:
        self.calls += 1
        return ["bright" if image[0, 0, 0] > 0.5 else "dark" for image in images]


def test_many_votes_are_right_more_often_than_one_answer() -> None:
    images = torch.full((200, 3, 4, 4), 0.6)
    shares = []
    for votes in (1, 15):
        victim = Reader()
        defended = DefendedVictim(
            victim, Defense(toys.Noise(0.2), votes=votes), generator=torch.Generator().manual_seed(0)
        )
        answers = defended.generate(images, ["Bright?"] * 200)
        assert victim.calls == votes
        shares.append(answers.count("bright") / 200)
    assert shares[0] < 0.8 < 0.9 < shares[1]


def test_votes_without_noise_are_refused() -> None:
    for purifier in (None, Identity()):
        with pytest.raises(CodefendError, match="noise"):
            Defense(purifier, votes=3)
    with pytest.raises(CodefendError, match="1 or more"):
        Defense(toys.Noise(), votes=0)


def test_the_name_of_a_purifier_is_no_defense() -> None:
    with pytest.raises(CodefendError, match=r"load_purifier\('bridge'\)"):
        Defense("bridge")  # type: ignore[arg-type]


def test_a_spec_says_the_number_of_votes() -> None:
    spec = parse_spec("bridge:sigma=0.1+prompt=doubt+votes=8")
    assert (spec.name, spec.prompt, spec.votes) == ("bridge", "doubt", 8)
    assert Defense.from_spec("bridge:sigma=0.1+votes=3").votes == 3
    for text in ("bridge+votes=0", "bridge+votes=many"):
        with pytest.raises(CodefendError, match="votes"):
            parse_spec(text)
    with pytest.raises(CodefendError, match="noise"):
        Defense.from_spec("jpeg+votes=3")


def test_an_evaluation_judges_the_vote_and_counts_its_cost(tmp_path: Path) -> None:
    config = EvalConfig(
        victim="toy",
        tasks=("questions",),
        defenses=("noise:sigma=0.6", "noise:sigma=0.6+votes=9"),
        attacks=("pgd",),
        steps=2,
        eot=2,
        resubmissions=2,
        limit=12,
    )
    rows = evaluate(config, tmp_path / "run", loaders=toys.loaders())
    clean = {
        defense: sum(row["mean_scores"]["vqa_accuracy"] for row in rows if row["defense"] == defense and not row["eps"])
        for defense in config.defenses
    }
    assert clean["noise:sigma=0.6"] < clean["noise:sigma=0.6+votes=9"]
    assert {row["threat"] for row in rows if row["defense"].endswith("votes=9")} == {"clean", "T0", "T2"}
    assert all(len(row["answers"]) == 2 for row in rows)
