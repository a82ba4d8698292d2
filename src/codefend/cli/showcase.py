"""Sample images and attacks for the gateway's page, with an embedded model."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from codefend import attacks, tasks
from codefend.attacks import norms, objectives
from codefend.core import images
from codefend.core.seeds import make_generator
from codefend.types import Budget, CodefendError, Victim, WhiteBox

if TYPE_CHECKING:
    from torch import Tensor

ATTACK = "apgd"
BUDGET = Budget(norm="linf", eps=8 / 255, steps=12)  # as `codefend demo`: some seconds on two slow cores
MAX_PIXELS = 1_000_000  # of an image to attack: its gradient is as large
SAMPLES = 24


class BenchShowcase:
    """`codefend.gateway.pocket.Showcase` with the tasks and attacks of the bench."""

    def sample(self, number: int, *, photographs: bool) -> dict[str, Any]:
        """A test image as a data URL, its question and the correct answer; captions and questions alternate.

        With ``photographs`` every third image is one, unless scikit-image, which brings them, is missing.
        """
        number %= SAMPLES
        kind = "vqa" if number % 2 else "caption"
        photographs &= number % 3 == 2 and find_spec("skimage") is not None
        example = tasks.load(f"photo-{kind}" if photographs else kind, limit=SAMPLES).examples[number]
        return {
            "image": images.encode_data_url(example.image),
            "question": example.prompt,
            "answer": example.references[0],
        }

    def attack(
        self, victim: Victim, image: Tensor, question: str, check: Callable[[], None] = lambda: None
    ) -> dict[str, Any]:
        """Attack one image ``[3, H, W]`` so that the undefended victim's answer changes; the result as a data URL.

        ``check`` is called at every gradient step and may raise to end the attack. Raises CodefendError for an image
        over ``MAX_PIXELS`` and for a victim without gradients.
        """
        if not isinstance(victim, WhiteBox):
            raise CodefendError("this model is a black box: it gives no gradient to attack")
        if image[0].numel() > MAX_PIXELS:
            raise CodefendError(f"images over {MAX_PIXELS:,} pixels are not attacked here; use `codefend attack`")
        clean = image[None]
        spec, answer = attacks.ATTACKS[ATTACK], victim.generate(clean, [question])[0]
        objective = objectives.objective_for(spec, victim, [question], [answer], "", clean)

        def checked(candidates: Tensor) -> Tensor:
            check()
            return objective(candidates)

        adversarial = spec.build()(checked, clean, BUDGET, generator=make_generator(0, "attack"))
        return {
            "image": images.encode_data_url(norms.quantize_in_budget(adversarial, clean, BUDGET)[0]),
            "attack": ATTACK,
            "eps": "8/255",
            "steps": BUDGET.steps,
        }


def showcase() -> BenchShowcase:
    """Make the showcase; tasks and attacks are imported with this module."""
    return BenchShowcase()
