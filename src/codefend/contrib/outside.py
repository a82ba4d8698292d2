"""Attacks written by others, run by their own code: Foolbox, ART and torchattacks (extra ``outside``).

Their libraries attack classifiers with logits. `LogitView` is the objective as such a classifier, so that each runs
unchanged through its public interface, and the images that it returns are judged as ours are: rounded to 8 bits,
checked against the budget, answered behind the defense. ``Budget.steps`` and ``Budget.eot`` mean what they mean for
our attacks: gradients per image, and samples averaged for each.

- Foolbox (Rauber et al. 2017, arXiv 1707.04131)
- Adversarial Robustness Toolbox (Nicolae et al. 2018, arXiv 1807.01069), with AutoAttack's ensemble of auto-PGD on two
  losses and Square (Croce & Hein 2020, arXiv 2003.01690)
- torchattacks (Kim 2020, arXiv 2010.01950): its metadata asks for torchvision, its code does not, so it is no part of
  the extra; install it with ``pip install --no-deps torchattacks``
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn

from codefend.attacks.base import AttackBase, ImageAttack
from codefend.attacks.norms import project
from codefend.types import Budget, CodefendError, Objective

INSTALL = {
    "foolbox": "pip install 'codefend[outside]'",
    "art": "pip install 'codefend[outside]'",
    "torchattacks": "pip install --no-deps torchattacks",
}
OTHERS = (0.0, -5.0, -5.0)  # logits of three wrong classes: the loss ratio of AutoAttack needs four classes


class LogitView(nn.Module):
    """An objective as a classifier of four classes, for attacks that make class 0 lose: ``[b, 3, H, W] -> [b, 4]``.

    The logit of class 0 is ``margin`` for the clean image and falls with the objective: attacks that stop at a success
    stop ``margin`` below the clean image's objective (nats per token). Rows of a batch that a library has cut down are
    matched with the clean images, near which they stay; CodefendError where two of those are the same image.
    """

    def __init__(self, objective: Objective, clean: Tensor, eot: int, margin: float, attack: AttackBase) -> None:
        super().__init__()
        self.objective, self.clean, self.eot, self.attack, self.calls = objective, clean, eot, attack, 0
        with torch.no_grad():
            shift = margin - torch.stack([objective(clean) for _ in range(eot)]).mean(0)
        self.shift = nn.Parameter(shift, requires_grad=False)  # a parameter, as libraries ask for its device

    def forward(self, images: Tensor) -> Tensor:
        rows = self._rows(images)
        values = torch.stack([self._score(images, rows) for _ in range(self.eot)]).mean(0)
        if images.requires_grad and self.attack.on_step is not None and len(images) == len(self.clean):
            self.attack.on_step(self.calls, values.detach())
            self.calls += 1
        others = values.new_tensor(OTHERS).expand(len(values), len(OTHERS))
        return torch.cat([(values + self.shift[rows])[:, None], others], dim=1)

    def _rows(self, images: Tensor) -> Tensor:
        """The examples of ``images``: all in their order, or those of the nearest clean images."""
        if len(images) == len(self.clean):
            return torch.arange(len(images), device=images.device)
        if len(self.clean.flatten(1).unique(dim=0)) < len(self.clean):
            raise CodefendError(f"{self.attack.name} needs batches without two questions on one image: set batch=1")
        return torch.cdist(images.detach().flatten(1), self.clean.flatten(1)).argmin(1)

    def _score(self, images: Tensor, rows: Tensor) -> Tensor:
        if torch.equal(rows, torch.arange(len(self.clean), device=rows.device)):
            return self.objective(images)
        return self.objective(self.clean.index_copy(0, rows, images))[rows]


@dataclass(kw_only=True)
class OutsideAttack(ImageAttack):
    """``algorithm`` of ``library``, with steps of ``rel_step`` eps / steps, from a random start."""

    library: str
    algorithm: str
    rel_step: float = 2.5
    margin: float = 1.0  # nats: some libraries return the clean image where they reach no success
    name: str = "outside"

    def perturb(self, objective: Objective, clean: Tensor, budget: Budget, generator: Generator | None) -> Tensor:
        run = RUNNERS.get((self.library, budget.norm))
        if run is None:
            raise CodefendError(f"{self.name} has no {budget.norm} form; use norm=linf, or Foolbox's and ART's attacks")
        package = _package(self.library)
        view = LogitView(objective, clean, max(budget.eot, 1), self.margin, self).eval()
        seed = 0 if generator is None else int(torch.randint(2**31, (1,), generator=generator, device=generator.device))
        with _seeded(seed):
            attacked: Tensor = run(package, self, view, clean, budget)
        return project(attacked.detach().to(clean), clean, budget)


def _foolbox(package: Any, attack: OutsideAttack, view: LogitView, clean: Tensor, budget: Budget) -> Tensor:
    steps = {"steps": budget.steps, "rel_stepsize": attack.rel_step / budget.steps}
    algorithm = getattr(package.attacks, ("Linf" if budget.norm == "linf" else "L2") + attack.algorithm)(**steps)
    model = package.PyTorchModel(view, bounds=(0, 1), device=clean.device)
    criterion = package.criteria.Misclassification(_labels(clean))
    _, attacked, _ = algorithm(model, clean, criterion, epsilons=budget.eps)
    return attacked  # type: ignore[no-any-return]


def _art(package: Any, attack: OutsideAttack, view: LogitView, clean: Tensor, budget: Budget) -> Tensor:
    from art.estimators.classification import PyTorchClassifier

    device = "gpu" if clean.device.type == "cuda" else "cpu"
    classifier = PyTorchClassifier(
        view,
        loss=nn.CrossEntropyLoss(),
        input_shape=tuple(clean.shape[1:]),
        nb_classes=1 + len(OTHERS),
        clip_values=(0.0, 1.0),
        device_type=device,
    )
    norm = np.inf if budget.norm == "linf" else 2
    ball = {"norm": norm, "eps": budget.eps, "eps_step": attack.rel_step * budget.eps / budget.steps}
    evasion = import_module("art.attacks.evasion")

    def auto_pgd(loss: str | None, steps: int) -> Any:
        first = {"eps_step": 2 * budget.eps, "max_iter": steps, "nb_random_init": 1, "loss_type": loss}
        own = {**ball, **first, "batch_size": len(clean), "verbose": False}
        return evasion.AutoProjectedGradientDescent(classifier, **own)

    if attack.algorithm == "PGD":
        pgd = {**ball, "max_iter": budget.steps, "num_random_init": 1, "batch_size": len(clean), "verbose": False}
        algorithm = evasion.ProjectedGradientDescent(classifier, **pgd)
    elif attack.algorithm == "APGD":
        algorithm = auto_pgd(None, budget.steps)
    else:
        third = max(budget.steps // 3, 1)
        square = evasion.SquareAttack(
            classifier, norm=norm, eps=budget.eps, max_iter=third, nb_restarts=1, verbose=False
        )
        attacks = [auto_pgd("cross_entropy", third), auto_pgd("difference_logits_ratio", third), square]
        algorithm = evasion.AutoAttack(classifier, **ball, attacks=attacks, batch_size=len(clean))
    return torch.from_numpy(algorithm.generate(clean.cpu().numpy(), _labels(clean).cpu().numpy()))


def _torchattacks(package: Any, attack: OutsideAttack, view: LogitView, clean: Tensor, budget: Budget) -> Tensor:
    options: dict[str, Any] = {"eps": budget.eps, "steps": budget.steps}
    if attack.algorithm != "APGD":
        options["alpha"] = attack.rel_step * budget.eps / budget.steps
    if attack.algorithm == "EOTPGD":  # it averages the gradient itself
        view.eot, options["eot_iter"] = 1, max(budget.eot, 1)
    algorithm = getattr(package, attack.algorithm)(view, **options)
    return algorithm(clean, _labels(clean))  # type: ignore[no-any-return]


Runner = Callable[[Any, OutsideAttack, LogitView, Tensor, Budget], Tensor]
RUNNERS: dict[tuple[str, str], Runner] = {
    **{(library, norm): run for library, run in (("foolbox", _foolbox), ("art", _art)) for norm in ("linf", "l2")},
    ("torchattacks", "linf"): _torchattacks,
}


def _labels(clean: Tensor) -> Tensor:
    return torch.zeros(len(clean), dtype=torch.long, device=clean.device)


def _package(library: str) -> Any:
    try:
        return import_module(library)
    except ModuleNotFoundError as error:
        raise CodefendError(f"attacks of {library} need {error.name}: {INSTALL[library]}") from error


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the global generators that the libraries draw from, and put them back."""
    before = np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        try:
            yield
        finally:
            np.random.set_state(before)  # noqa: NPY002
