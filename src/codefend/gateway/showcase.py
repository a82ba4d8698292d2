"""What the page can show with the embedded model: pictures that it knows, and attacks on it. Runs in its thread."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from torch import Tensor

from codefend.core import images
from codefend.types import Budget, CodefendError, Victim, WhiteBox

ATTACK = "apgd"
BUDGET = Budget(norm="linf", eps=8 / 255, steps=12)  # `codefend demo`'s: some seconds on two slow cores
MAX_PIXELS = 1_000_000  # of a picture to attack: its gradient is as large
SAMPLES = 24


def sample(number: int) -> dict[str, Any]:
    """A test picture as a data URL, what to ask about it, and the right answer; captions and questions take turns."""
    load = import_module("codefend.tasks").load
    number %= SAMPLES
    example = load("vqa" if number % 2 else "caption", limit=SAMPLES).examples[number]
    return {
        "image": images.encode_data_url(example.image),
        "question": example.prompt,
        "answer": example.references[0],
    }


def attacked(victim: Victim, image: Tensor, question: str) -> dict[str, Any]:
    """Attack one image ``[3, H, W]`` so that the bare victim's answer changes; the result as a data URL.

    Raises CodefendError for a picture over ``MAX_PIXELS`` and for a victim that shows no gradient.
    """
    if not isinstance(victim, WhiteBox):
        raise CodefendError("this model is a black box: it gives no gradient to attack")
    if image[0].numel() > MAX_PIXELS:
        raise CodefendError(f"pictures over {MAX_PIXELS:,} pixels are not attacked here; use `codefend attack`")
    attacks, norms = import_module("codefend.attacks"), import_module("codefend.attacks.norms")
    generator = import_module("codefend.core.runs").make_generator(0, "attack")
    clean = image[None]
    spec, answer = attacks.ATTACKS[ATTACK], victim.generate(clean, [question])[0]
    objective = attacks.objective_for(spec, victim, [question], [answer], "", clean)
    found = spec.build()(objective, clean, BUDGET, generator=generator)
    return {
        "image": images.encode_data_url(norms.quantize_in_budget(found, clean, BUDGET)[0]),
        "attack": ATTACK,
        "eps": "8/255",
        "steps": BUDGET.steps,
    }
