"""Our attacks against Foolbox's and ART's on the same objective, budget and steps, on the undefended pocket.

    python benchmarks/crosscheck.py --run DIR [--task caption] [--limit 32] [--steps 50] [--norm linf] [--eps 8/255]
        [--objectives likelihood features] [--only apgd "ART auto-PGD"] [--minutes M]

Every finished attack is stored in the run folder: rerun the command to resume. For all attacks the lowest objective
counts among the images inside the ball that they evaluated. Exits 1 when one of theirs is below its counterpart, or
below our APGD, by more than two standard errors of the paired difference. Needs `foolbox` and
`adversarial-robustness-toolbox`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import eagerpy as ep
import foolbox
import numpy as np
import torch
from art.attacks.evasion import AutoProjectedGradientDescent, ProjectedGradientDescent
from art.estimators import BaseEstimator, LossGradientsMixin
from art.estimators.classification import ClassifierMixin
from torch import Tensor

from codefend import tasks, victims
from codefend.attacks import ATTACKS
from codefend.attacks.base import BestImages
from codefend.attacks.norms import distance
from codefend.attacks.objectives import objective_for
from codefend.core.images import quantize8
from codefend.core.runs import Run, open_run
from codefend.core.seeds import make_generator
from codefend.core.settings import number
from codefend.types import Budget, Objective

SEED = 0
OBJECTIVES = {"likelihood": "apgd", "features": "feature"}  # name -> an attack of ours that lowers it


class Record:
    """An objective that records, per image, its lowest value inside the ball."""

    def __init__(self, objective: Objective, clean: Tensor, budget: Budget) -> None:
        self.objective, self.clean, self.budget = objective, clean, budget
        self.best = BestImages(clean, torch.full((len(clean),), torch.inf))

    def __call__(self, images: Tensor) -> Tensor:
        losses = self.objective(images)
        inside = distance(images.detach(), self.clean, self.budget.norm) <= self.budget.eps * (1 + 1e-5) + 1e-6
        inside &= (images.detach().flatten(1) - 0.5).abs().amax(1) <= 0.5 + 1e-6
        self.best.update(images, torch.where(inside, losses.detach(), torch.full_like(losses, torch.nan)))
        return losses

    @torch.no_grad()
    def finish(self, images: Tensor) -> Tensor:
        self(images.to(self.clean))
        return self.best.losses


class Always(torch.nn.Module):
    """Logits that are right whatever the image: an attack that stops at success goes on to its last step."""

    def forward(self, images: Tensor) -> Tensor:
        return images.new_tensor([5.0, 0.0]).expand(len(images), 2)


def foolbox_attack(name: str, **options: Any) -> Callable[[Record], Tensor]:
    def run(record: Record) -> Tensor:
        class Ours(getattr(foolbox.attacks, name)):  # type: ignore[misc]
            def get_loss_fn(self, model: Any, labels: Any) -> Callable[[Any], Any]:
                return lambda inputs: -ep.astensor(record(inputs.raw)).sum()

        torch.manual_seed(SEED)
        model = foolbox.PyTorchModel(Always().eval(), bounds=(0, 1), device="cpu")
        labels = torch.zeros(len(record.clean), dtype=torch.long)
        criterion = foolbox.criteria.Misclassification(labels)
        _, adv, _ = Ours(**options)(model, record.clean, criterion, epsilons=record.budget.eps)
        return record.finish(adv)

    return run


class Estimator(ClassifierMixin, LossGradientsMixin, BaseEstimator):  # type: ignore[misc]
    """What ART asks of a classifier, answered by an objective."""

    estimator_params = BaseEstimator.estimator_params

    def __init__(self, record: Record) -> None:
        super().__init__(model=None, clip_values=(0.0, 1.0))
        self.record, self.nb_classes = record, 2

    @property
    def input_shape(self) -> tuple[int, ...]:
        return tuple(self.record.clean.shape[1:])

    def predict(self, x: Any, **kwargs: Any) -> Any:
        return Always()(torch.as_tensor(x)).numpy().astype(np.float32)

    def compute_loss(self, x: Any, y: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return -self.record(torch.as_tensor(x, dtype=torch.float32)).numpy()

    def loss_gradient(self, x: Any, y: Any, **kwargs: Any) -> Any:
        images = torch.as_tensor(x, dtype=torch.float32).requires_grad_(True)
        (grad,) = torch.autograd.grad(-self.record(images).sum(), images)
        return grad.numpy()

    def fit(self, x: Any, y: Any, **kwargs: Any) -> None:
        raise NotImplementedError("an objective does not learn")


def art_attack(build: Callable[..., Any], *, rel_step: float, **options: Any) -> Callable[[Record], Tensor]:
    def run(record: Record) -> Tensor:
        np.random.seed(SEED)  # noqa: NPY002 (ART draws from it)
        budget, clean = record.budget, record.clean
        norm = np.inf if budget.norm == "linf" else 2
        attack = build(
            Estimator(record), norm=norm, eps=budget.eps, eps_step=rel_step * budget.eps, max_iter=budget.steps,
            batch_size=len(clean), verbose=False, **options,
        )  # fmt: skip
        adv = attack.generate(clean.numpy().copy(), np.eye(2, dtype=np.float32)[[0] * len(clean)])
        return record.finish(torch.as_tensor(adv))

    return run


def theirs(budget: Budget) -> dict[str, tuple[str, Callable[[Record], Tensor]]]:
    """Name -> (our counterpart, their attack) with our step lengths."""
    prefix, steps, rel = "Linf" if budget.norm == "linf" else "L2", budget.steps, 2.5 / budget.steps
    momentum = f"{prefix}MomentumIterativeFastGradientMethod"
    return {
        "Foolbox PGD": ("pgd", foolbox_attack(f"{prefix}PGD", steps=steps, rel_stepsize=rel)),
        "Foolbox Adam PGD": ("pgd", foolbox_attack(f"{prefix}AdamPGD", steps=steps, rel_stepsize=rel)),
        "Foolbox MI-FGSM": ("mifgsm", foolbox_attack(momentum, steps=steps, rel_stepsize=1 / steps)),
        "ART PGD": ("pgd", art_attack(ProjectedGradientDescent, rel_step=rel, num_random_init=1)),
        "ART auto-PGD": ("apgd", art_attack(AutoProjectedGradientDescent, rel_step=2.0, nb_random_init=1)),
    }


def ours(name: str, record: Record) -> Tensor:
    adv = ATTACKS[name].build()(record, record.clean, record.budget, generator=make_generator(SEED, name))
    return record.finish(adv)


def beaten(their: Tensor, our: Tensor) -> tuple[str, bool]:
    """Their mean less ours with two standard errors, and whether that is below sampling noise."""
    gap = their - our
    error = float(2 * gap.std() / len(gap) ** 0.5)
    return f"{float(gap.mean()):+.4f} ± {error:.4f}", float(gap.mean()) < -error


@dataclass(frozen=True)
class Settings:
    """What the figures depend on, saved in the run folder."""

    task: str
    limit: int
    steps: int
    norm: str
    eps: str
    batch: int

    @property
    def budget(self) -> Budget:
        return Budget("linf" if self.norm == "linf" else "l2", number(self.eps), self.steps)


def contestants(budget: Budget, only: Sequence[str] = ()) -> dict[str, Callable[[Record], Tensor]]:
    """Ours first, then theirs; our APGD always, of the others those in ``only`` unless it is empty."""
    own = {name: lambda record, name=name: ours(name, record) for name in ("pgd", "mifgsm", "apgd")}
    both = own | {name: attack for name, (_, attack) in theirs(budget).items()}
    return {name: attack for name, attack in both.items() if not only or name in (*only, "apgd")}


def fill(run: Run, settings: Settings, goals: list[str], only: Sequence[str], deadline: float) -> None:
    """Attack whatever the run lacks, until the deadline: a row per objective, attack and batch."""
    victim, task = None, tasks.load(settings.task, limit=settings.limit)
    for goal in goals:
        for start in range(0, len(task.examples), settings.batch):
            examples = task.examples[start : start + settings.batch]
            for name, attack in contestants(settings.budget, only).items():
                key = f"{goal} | {name} | {start}"
                if run.has(key):
                    continue
                if time.monotonic() > deadline:
                    return
                victim = victim or victims.load("pocket")
                clean = quantize8(torch.stack([example.image for example in examples]))
                prompts, answers = [e.prompt for e in examples], [e.references[0] for e in examples]
                objective = objective_for(ATTACKS[OBJECTIVES[goal]], victim, prompts, answers, "", clean)
                lowest = attack(Record(objective, clean, settings.budget))
                run.append({"key": key, "goal": goal, "attack": name, "start": start, "lowest": lowest.tolist()})
                print(key, "done", file=sys.stderr, flush=True)


def table(goal: str, rows: list[dict[str, Any]], settings: Settings, only: Sequence[str]) -> bool:
    """Print the rows of one objective, on the batches that every attack has finished; whether ours were beaten."""
    names, failed = list(contestants(settings.budget, only)), False
    pairs = {name: pair for name, (pair, _) in theirs(settings.budget).items()}
    lowest = {(row["attack"], row["start"]): row["lowest"] for row in rows if row["goal"] == goal}
    starts = sorted({start for _, start in lowest if all((name, start) in lowest for name in names)})
    if not starts:
        print(f"| {goal} | not all attacks measured yet | | | | |")
        return False
    values = {name: torch.tensor([v for start in starts for v in lowest[name, start]]) for name in names}
    for name, value in values.items():
        cells = ["", "", ""]
        if pairs.get(name) in values:
            (near, worse), (best, worst) = (beaten(value, values[other]) for other in (pairs[name], "apgd"))
            failed |= worse or worst
            cells = [pairs[name], near + " **beaten**" * worse, best + " **beaten**" * worst]
        print(f"| {goal} | {name} (n = {len(value)}) | {float(value.mean()):.4f} | {' | '.join(cells)} |")
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="run folder")
    parser.add_argument("--task", default="caption")
    parser.add_argument("--limit", type=int, default=32)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--norm", choices=("linf", "l2"), default="linf")
    parser.add_argument("--eps", default="8/255")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--objectives", nargs="+", choices=list(OBJECTIVES), default=list(OBJECTIVES))
    parser.add_argument("--only", nargs="+", default=[], help="these attacks of both sides, and our APGD")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no further attack after this long")
    args = vars(parser.parse_args())
    folder, goals, only, minutes = (args.pop(name) for name in ("run", "objectives", "only", "minutes"))
    settings = Settings(**args)
    with open_run(folder, settings) as run:
        fill(run, settings, goals, only, time.monotonic() + 60 * minutes)
        rows = run.rows()
    print(f"{settings.task}, {settings.norm} {settings.eps}, {settings.steps} steps; lower is better\n")
    print("| objective | attack | mean | our counterpart | theirs less it | theirs less our APGD |")
    print("|---" * 6 + "|")
    beaten_somewhere = [table(goal, rows, settings, only) for goal in goals]
    return int(any(beaten_somewhere))


if __name__ == "__main__":
    sys.exit(main())
