"""PureProof (CVPR 2026): a perturbation that survives diffusion purification. A reconstruction.

Built from a description of the paper, not from its text or code: the loss is
``beta * SRA + (1 - beta) * ARA + SCR`` with SRA the objective at the one-step denoised image x0(x_t, t),
t ~ U{1..T_p}; ARA its mean over K images re-noised from x0 and denoised again; and SCR = (1 - t/T_p) |x0' - x0|^2,
which keeps the re-noised predictions close to the first. Ours: re-noising at the same t, and SCR as a mean over pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Generator, Tensor
from torch.nn.functional import pad

from codefend.attacks.base import ImageAttack
from codefend.attacks.norms import descend, uniform
from codefend.core.assets import asset
from codefend.core.seeds import noise_like
from codefend.purifiers.base import clip
from codefend.purifiers.diffpure import vp_sigma
from codefend.purifiers.nets import Denoiser, PurifierNet, load_net
from codefend.types import Budget, Objective

TIMES = 1000  # steps of the discrete diffusion that ``longest`` counts
PROBES = 4  # fixed noises on which iterates are compared


@lru_cache(maxsize=1)
def shipped_prior() -> Denoiser:
    """The unconditional prior that comes with the package: the attacker's surrogate, DiffPure's denoiser here."""
    net, _ = load_net(asset("weights/prior"))
    return net.requires_grad_(False)


@dataclass(kw_only=True)
class PureProof(ImageAttack):
    """Sign steps on the objective behind a surrogate denoiser at random strengths; the best on fixed noise is returned.

    Defaults as described: beta 0.3, K 3, T_p 150, 10 samples per step, 100 steps of eps / 16. Each sample costs
    1 + ``renoised`` evaluations of the denoiser and of the objective.
    """

    beta: float = 0.3  # weight of the single reconstruction against the re-noised ones
    renoised: int = 3  # K
    longest: int = 150  # T_p, of 1000 diffusion steps
    samples: int = 10  # draws of (t, noise) averaged per gradient
    rel_step: float = 1 / 16  # times eps
    denoiser: Denoiser | None = None  # None: the shipped prior
    name: str = "pureproof"

    def perturb(self, objective: Objective, clean: Tensor, budget: Budget, generator: Generator | None) -> Tensor:
        x = clean
        net = self.denoiser or shipped_prior()
        probes = [
            (self.longest * (i + 1) / PROBES / TIMES, noise_like(clean[:1], generator).expand_as(clean))
            for i in range(PROBES)
        ]

        def on_probes(images: Tensor) -> Tensor:
            return torch.stack([objective(_denoised(net, images, t, noise)) for t, noise in probes]).mean(0)

        def on_draws(images: Tensor) -> Tensor:
            return self._loss(objective, net, images, generator)

        best = self.best_of(on_probes, clean, budget.eot)
        for step in range(budget.steps):
            _, grad = self.gradient(on_draws, x, self.samples * max(budget.eot, 1), step)
            x = descend(x, grad, self.rel_step * budget.eps, clean, budget)
            best.update(x, self.score(on_probes, x, budget.eot))
        return self.select(best, on_probes, x, budget)

    def _loss(self, objective: Objective, net: Denoiser, images: Tensor, generator: Generator | None) -> Tensor:
        step = int(uniform(images, generator, shape=(1,)) * self.longest) + 1
        t, weight = step / TIMES, 1 - step / self.longest
        first = _denoised(net, images, t, noise_like(images, generator))
        again = [_denoised(net, first, t, noise_like(images, generator)) for _ in range(self.renoised)]
        loss = self.beta * objective(first)
        for second in again:
            drift = (second - first).square().flatten(1).mean(1)
            loss = loss + ((1 - self.beta) * objective(second) + weight * drift) / len(again)
        return loss


def _denoised(net: Denoiser, images: Tensor, t: float, noise: Tensor) -> Tensor:
    """One-step prediction of the clean image from VP time ``t``, at any size."""
    sigma = float(vp_sigma(torch.tensor(t, dtype=torch.float64)))
    noisy = images + sigma * noise
    multiple = net.multiple if isinstance(net, PurifierNet) else 1
    height, width = images.shape[-2:]
    padded = pad(noisy, (0, -width % multiple, 0, -height % multiple), mode="replicate")
    # In the network's own precision, which need not be the images'.
    level = torch.full((len(images),), sigma, device=images.device)
    x0 = net(padded.float(), torch.zeros_like(level), level).to(images.dtype)
    return clip(x0[..., :height, :width])
