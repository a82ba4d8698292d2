"""Auto-PGD (Croce & Hein 2020, arXiv 2003.01690, Algorithm 1), with a step size and restarts for each example.

Two rules differ from the paper's, as in the Adversarial Robustness Toolbox, whose auto-PGD beat the paper's rules on a
language model's loss (docs/notebook): a step counts as progress when it is below the best so far, not below the last;
and after a return to the best point the momentum is that of the move which led there.

Where ``Budget.eot`` is above 1 and two evaluations of the clean images differ, the objective is stochastic, and the
paper's step rule reads noise: a lucky loss counts as progress, which keeps steps too long, and is then the best that no
later iterate reaches, so that the search returns to it. There the step falls linearly from eps to eps / 20
instead, with the paper's momentum and no returns (docs/notebook). A run of fewer than 5 steps has none to spare for
short ones: it keeps the paper's rule, and evaluates the best point again on fresh samples at each checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from codefend.attacks.base import BestImages, ImageAttack
from codefend.attacks.norms import choose, descend, project, random_start
from codefend.types import Budget, Objective


def checkpoints(steps: int) -> list[int]:
    """Iterations at which the step size is reconsidered: w_j = ceil(p_j N), in exact arithmetic (sec. 3.1)."""
    marks, last, now = [], 0, 22  # percent of the budget: p_0 = 0, p_1 = 0.22
    while now <= 100:
        marks.append(-(-now * steps // 100))
        last, now = now, now + max(now - last - 3, 6)
    return marks


FEWEST = 5  # steps of the schedule for stochastic objectives
REL_LAST = 0.05  # its last step, times eps


@dataclass(kw_only=True)
class APGD(ImageAttack):
    """Momentum descent that halves its step and returns to the best point whenever progress stalls.

    On stochastic objectives the step falls by a schedule instead, see the module.
    """

    alpha: float = 0.75  # share of the new step against the last move (sec. 3.1)
    rho: float = 0.75  # of the steps between checkpoints must have brought a new best
    rel_step: float = 2.0  # first step, times eps
    random_start: bool = True  # False starts at the clean image, as RobustVLM does
    restarts: int = 1  # independent runs, best per example
    name: str = "apgd"

    def perturb(self, objective: Objective, clean: Tensor, budget: Budget, generator: Generator | None) -> Tensor:
        overall, last = self.best_of(objective, clean, budget.eot), clean
        descent = self._scheduled if self._is_stochastic(objective, clean, budget) else self._run
        for run in range(self.restarts):
            start = random_start(clean, budget, generator=generator) if self.random_start or run else clean
            best, last = descent(objective, start, clean, budget, run * (budget.steps + 1))
            overall.update(best.images, best.losses)
        return self.select(overall, objective, last, budget)

    def _is_stochastic(self, objective: Objective, clean: Tensor, budget: Budget) -> bool:
        if budget.eot < 2 or budget.steps < FEWEST:
            return False
        return not torch.equal(self.score(objective, clean, 1), self.score(objective, clean, 1))

    def _scheduled(
        self, objective: Objective, x: Tensor, clean: Tensor, budget: Budget, first: int
    ) -> tuple[BestImages, Tensor]:
        """As `_run`, for stochastic objectives: step lengths that depend on no loss, and no returns."""
        best, previous_x = BestImages(x, torch.full((len(x),), torch.inf, device=x.device)), x
        for k in range(budget.steps):
            f, grad = self.gradient(objective, x, budget.eot, first + k)
            best.update(x, f)
            z = descend(x, grad, budget.eps * (1 - (1 - REL_LAST) * k / (budget.steps - 1)), clean, budget)
            alpha = self.alpha if k else 1.0
            previous_x, x = x, project(x + alpha * (z - x) + (1 - alpha) * (x - previous_x), clean, budget)
        best.update(x, self.score(objective, x, budget.eot, first + budget.steps))
        return best, x

    def _run(
        self, objective: Objective, x: Tensor, clean: Tensor, budget: Budget, first: int
    ) -> tuple[BestImages, Tensor]:
        """Algorithm 1 in the paper's symbols (f is minimized): x^(k), eta, z. ``first`` numbers its hooks."""
        f, grad = self.gradient(objective, x, budget.eot, first)
        best, best_grad, previous_x, before_best = BestImages(x, f), grad, x, x
        eta = torch.full_like(f, self.rel_step * budget.eps)
        gains, best_at_mark, halved = torch.zeros_like(f), best.losses, torch.zeros_like(f, dtype=torch.bool)
        marks, last_mark = checkpoints(budget.steps), 0
        for k in range(1, budget.steps + 1):
            z = descend(x, grad, eta, clean, budget)
            alpha = 1.0 if k == 1 else self.alpha
            moved = project(x + alpha * (z - x) + (1 - alpha) * (x - previous_x), clean, budget)
            previous_x, x = x, moved
            if k == budget.steps:  # nothing follows the last iterate: its loss is enough
                best.update(x, self.score(objective, x, budget.eot, first + k))
                break
            f, grad = self.gradient(objective, x, budget.eot, first + k)
            better = best.update(x, f)
            gains = gains + better
            best_grad, before_best = choose(better, grad, best_grad), choose(better, previous_x, before_best)
            if k in marks:
                if budget.eot > 1:
                    best.losses, best_grad = self.gradient(objective, best.images, budget.eot)
                    better = best.update(x, f)
                    best_grad, before_best = choose(better, grad, best_grad), choose(better, previous_x, before_best)
                stalled = gains < self.rho * (k - last_mark)  # condition 1
                stalled |= ~halved & (best.losses >= best_at_mark)  # condition 2
                eta = torch.where(stalled, eta / 2, eta)
                x, grad = choose(stalled, best.images, x), choose(stalled, best_grad, grad)
                previous_x = choose(stalled, before_best, previous_x)
                gains, best_at_mark, halved, last_mark = torch.zeros_like(f), best.losses, stalled, k
        return best, x
