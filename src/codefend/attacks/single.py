"""Run one attack on a batch of images: the function behind `codefend.attack`. Imports no torch until it is called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from codefend.attacks.specs import NEEDS_IMAGE, NEEDS_SENTENCE
from codefend.attacks.table import ATTACKS
from codefend.core.specs import lookup
from codefend.types import Budget, CodefendError, Victim

if TYPE_CHECKING:
    from torch import Tensor


def attack(
    victim: Victim,
    images: Tensor,
    prompts: Sequence[str],
    answers: Sequence[str] | None = None,
    *,
    attack: str = "apgd",
    eps: float = 8 / 255,
    norm: str = "linf",
    steps: int | None = None,
    eot: int = 1,
    target: str | Sequence[str] = "",
    target_images: Tensor | None = None,
    reference: Victim | None = None,
    seed: int = 0,
) -> Tensor:
    """Return adversarial images ``[B, 3, H, W]`` in [0, 1], within ``eps`` of ``images`` and rounded to 8 bits.

    Pass a `DefendedVictim` to attack through the whole defense (adaptive white-box, T2), the bare victim for an attack
    that does not know the defense (oblivious, T0). ``answers`` are the correct answers that untargeted attacks lead
    away from; by default the victim's own answers to ``images``. ``target`` is the sentence, or one per image, that a
    targeted attack forces. ``eps`` is in pixel units; ``steps`` defaults to the attack's own; ``eot`` is the number of
    gradient samples averaged per step, for stochastic defenses. ``reference`` is the victim whose clean features a
    feature attack leads away from; by default ``victim`` itself.

    Raises CodefendError for an unknown attack, a radius out of range, a missing target, or a victim without the
    gradient that the attack needs.

    >>> import codefend, torch
    >>> class Brightness:
    ...     name = "brightness"
    ...     def generate(self, images, prompts):
    ...         return ["bright" if image.mean() > 0.5 else "dark" for image in images]
    ...     def loss(self, images, prompts, targets):  # [B], differentiable in the images
    ...         signs = torch.tensor([1.0 if target == "bright" else -1.0 for target in targets])
    ...         return torch.nn.functional.softplus(signs * (0.5 - images.mean((1, 2, 3))))
    >>> victim, images = Brightness(), torch.full((1, 3, 16, 16), 0.51)
    >>> adversarial = codefend.attack(victim, images, ["Bright or dark?"], eps=8 / 255, steps=5)
    >>> victim.generate(images, ["Bright or dark?"]), victim.generate(adversarial, ["Bright or dark?"])
    (['bright'], ['dark'])
    """
    from codefend.attacks.norms import quantize_attacked
    from codefend.attacks.objectives import objective_for
    from codefend.core.seeds import make_generator

    spec = lookup("attack", attack, ATTACKS)
    check_target(attack, target, target_images)
    budget = Budget(_norm(norm), _radius(eps, norm), steps or spec.steps, eot)
    references = victim.generate(images, prompts) if answers is None else answers
    objective = objective_for(spec, victim, prompts, references, target, images, target_images, reference=reference)
    run = spec.build()
    adversarial = run(objective, images, budget, generator=make_generator(seed, "attack"))
    return quantize_attacked(run, adversarial, images, budget)


def check_target(attack: str, target: str | Sequence[str], target_images: object) -> None:
    """Raise CodefendError when ``attack`` is unknown or lacks the target that its goal needs."""
    spec = lookup("attack", attack, ATTACKS)
    if spec.goal in NEEDS_SENTENCE and not target:
        raise CodefendError(f"attack {spec.name!r} needs --target, the sentence to force")
    if spec.goal in NEEDS_IMAGE and target_images is None:
        raise CodefendError(f"attack {spec.name!r} needs --target-image, an image that it imitates or hides")


def _norm(norm: str) -> Literal["linf", "l2"]:
    if norm == "linf":
        return "linf"
    if norm == "l2":
        return "l2"
    raise CodefendError(f"unknown norm {norm!r}; choose linf or l2")


def _radius(eps: float, norm: str) -> float:
    if not 0 <= eps <= (1 if norm == "linf" else 1e4):
        raise CodefendError(f"eps={eps:g} is out of range; pixels are in [0, 1], so write 8/255 or 0.03")
    return eps
