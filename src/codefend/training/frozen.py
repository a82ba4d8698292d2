"""Frozen networks that are attacked for banks of pairs and guide trainings: encoders, and a pocket's words."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from codefend import encoders
from codefend.attacks import objectives
from codefend.encoders.views import ViewedEncoder
from codefend.tasks.objects import COLOURS, THINGS
from codefend.types import Objective, WhiteBox
from codefend.victims.pocket import Pocket

OWN = "victim"  # among encoders by name: the victim's own
WORDS = tuple(f" {c} {t.name}" for t in THINGS if t.tinted for c in COLOURS) + tuple(
    f" {t.name}" for t in THINGS if not t.tinted
)


Text = tuple[str, str]  # prompt, answer
AnyEncoder = ViewedEncoder | WhiteBox  # by name, or the victim's own


def check_encoders(names: Sequence[str]) -> None:
    """Raise CodefendError for a name that is neither an encoder, a folder of one, nor `OWN`; loads nothing."""
    for name in names:
        if name != OWN:
            encoders.check_name(name)


def load_encoders(names: Sequence[str], victim: WhiteBox) -> list[AnyEncoder]:
    """The encoders by name; `OWN` is the victim itself. Raises CodefendError for an unknown name."""
    check_encoders(names)
    return [victim if name == OWN else ViewedEncoder(name) for name in names]


def answers_objective(victim: WhiteBox, texts: Sequence[Text], *, towards: bool) -> Objective:
    """Language-model loss: away from the true answers, or towards those of the next image of the batch."""
    prompts, answers = [prompt for prompt, _ in texts], [answer for _, answer in texts]
    if towards:
        return objectives.targeted(victim, prompts, answers[1:] + answers[:1])
    return objectives.untargeted(victim, prompts, answers)


def answers_loss(victim: WhiteBox, images: Tensor, texts: Sequence[Text]) -> Tensor:
    """Mean language-model loss of the true answers, a scalar; 0 without texts."""
    if not texts:
        return images.new_zeros(())
    return victim.loss(images, [prompt for prompt, _ in texts], [answer for _, answer in texts]).mean()


def word_objective(pocket: Pocket, clean: Tensor, target: Tensor | None = None) -> Objective:
    """Cross-entropy of each token's nearest words: away from those of ``clean``, or towards those of ``target``."""
    with torch.no_grad():
        labels = pocket.word_scores(clean if target is None else target, WORDS).argmax(-1)
    sign = -1.0 if target is None else 1.0

    def objective(images: Tensor) -> Tensor:
        return sign * objectives.word_loss(pocket.word_scores(images, WORDS), labels)

    return objective
