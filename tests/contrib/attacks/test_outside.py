"""Attacks of other libraries through the logit view: inside the budget, as strong as ours, and reproducible."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from attacks_kit import ToyVictim, sample_images
from codefend.attacks import ATTACKS, EVERY_ATTACK, OUTSIDE_ATTACKS, AttackSpec
from codefend.attacks.base import ImageAttack
from codefend.attacks.norms import distance
from codefend.attacks.objectives import objective_for
from codefend.contrib import outside
from codefend.contrib.attacks.robustvlm import RobustVLM
from codefend.contrib.outside import LogitView
from codefend.types import Budget, CodefendError

BUDGET = Budget("linf", 8 / 255, 12)
PROMPTS, ANSWERS = ["a", "bb", "ccc", "dd"], ["x", "yy", "zzz", "x"]
pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries warn of NumPy and of one another


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def goal(clean: Tensor):  # type: ignore[no-untyped-def]
    return objective_for(ATTACKS["pgd"], ToyVictim(), PROMPTS, ANSWERS, "", clean)


@pytest.mark.parametrize("spec", OUTSIDE_ATTACKS.values(), ids=lambda spec: spec.name)
def test_it_lowers_the_objective_about_as_much_as_ours_inside_the_budget(spec: AttackSpec) -> None:
    if spec.options["library"] == "torchattacks" and find_spec("torchattacks") is None:
        pytest.skip("torchattacks is not installed")
    clean = sample_images(4)
    objective = goal(clean)
    attacked = spec.build()(objective, clean, BUDGET, generator=seeded())
    ours = ATTACKS["pgd"].build()(objective, clean, BUDGET, generator=seeded())
    assert float(distance(attacked, clean, "linf").max()) <= BUDGET.eps * (1 + 1e-4)
    assert torch.equal(attacked, spec.build()(objective, clean, BUDGET, generator=seeded()))
    start, theirs, own = (objective(images).mean() for images in (clean, attacked, ours))
    assert start - theirs > min(0.4 * (start - own), 0.9)  # some stop at a success, 1 nat below the clean image
    assert own < start


def test_it_takes_as_many_gradients_as_the_budget_has_steps() -> None:
    clean = sample_images(4)
    steps: list[int] = []
    for name in ("foolbox-pgd", "art-pgd"):
        attack = EVERY_ATTACK[name].build()
        assert isinstance(attack, ImageAttack)
        steps.clear()
        attack.on_step = lambda step, losses: steps.append(step)
        attack(goal(clean), clean, BUDGET, generator=seeded())
        assert steps == list(range(BUDGET.steps))


def test_rows_that_a_library_has_cut_out_are_scored_as_in_the_whole_batch() -> None:
    clean = sample_images(4)
    view = LogitView(goal(clean), clean, 2, 6.0, RobustVLM())
    moved = (clean + 4 / 255).clamp(0, 1)
    whole = view(moved)
    assert whole.shape == (4, 4)
    assert torch.allclose(view(moved[[2, 0]]), whole[[2, 0]], atol=1e-5)
    assert torch.allclose(whole[:, 0] - 6, goal(clean)(moved) - goal(clean)(clean), atol=1e-4)


def test_two_questions_on_one_image_keep_their_own_objectives() -> None:
    clean = sample_images(1).expand(2, -1, -1, -1).clone()
    signs = torch.tensor([1.0, -1.0])

    def objective(images: Tensor) -> Tensor:
        return signs * images.flatten(1).sum(1)

    view = LogitView(objective, clean, 1, 6.0, RobustVLM())
    images = clean.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(view(images)[:, 0].sum(), images)
    assert gradient[0].unique().tolist() == [1.0]
    assert gradient[1].unique().tolist() == [-1.0]
    with pytest.raises(CodefendError, match="set batch=1"):
        view(clean[:1])


def test_a_missing_library_and_a_norm_that_it_lacks_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    clean = sample_images(4)
    with pytest.raises(CodefendError, match="linf"):
        EVERY_ATTACK["torchattacks-pgd"].build()(goal(clean), clean, Budget("l2", 1.0, 2))

    def missing(name: str) -> None:
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr(outside, "import_module", missing)
    with pytest.raises(CodefendError, match=r"pip install 'codefend\[outside\]'"):
        EVERY_ATTACK["foolbox-pgd"].build()(goal(clean), clean, BUDGET)


def test_the_second_half_of_robustvlms_schedule_goes_on_from_the_first() -> None:
    clean = sample_images(4)
    objective = goal(clean)
    halves = [Budget("linf", 8 / 255, steps) for steps in (6, 12)]
    first, both = (RobustVLM()(objective, clean, budget) for budget in halves)
    assert float(objective(both).mean()) <= float(objective(first).mean()) < float(objective(clean).mean())
    assert float(distance(both, clean, "linf").max()) <= 8 / 255 + 1e-6
