"""PureProof."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from attacks_kit import (
    ToyVictim,
    sample_images,
    seeded,
)
from codefend.attacks.objectives import features_towards
from codefend.attacks.pgd import PGD
from codefend.contrib.attacks.pureproof import PureProof, shipped_prior
from codefend.types import Budget


class Blur:
    """A denoiser that keeps only 4 x 4 means: what is finer than that never reaches the victim."""

    def __call__(self, images: Tensor, s: Tensor, sigma: Tensor) -> Tensor:
        return interpolate(avg_pool2d(images, 4), scale_factor=4)


def test_pureproof_survives_a_purifier_that_removes_pgd() -> None:
    clean, net = sample_images(), Blur()
    aim = features_towards(ToyVictim(), 1 - clean)
    zero = torch.zeros(3)
    budget = Budget("linf", 16 / 255, 20)
    proof = PureProof(denoiser=net, samples=3, renoised=1, rel_step=0.15)(aim, clean, budget, generator=seeded())
    plain = PGD()(aim, clean, budget, generator=seeded())
    before, survived, undone = (aim(net(x, zero, zero)) for x in (clean, proof, plain))
    assert aim(plain).mean() < aim(proof).mean()  # without a purifier plain steps are better
    assert (survived < before - 0.01).all()
    assert survived.mean() < undone.mean() - 0.01


def test_pureproof_uses_the_shipped_prior_at_any_size() -> None:
    clean = sample_images(3, 13)
    calls: list[torch.Size] = []

    def aim(images: Tensor) -> Tensor:
        calls.append(images.shape)
        return images.flatten(1).mean(1)

    adv = PureProof(samples=2, renoised=1)(aim, clean, Budget("linf", 8 / 255, 4), generator=seeded())
    assert set(calls) == {clean.shape}
    assert (aim(adv) < aim(clean)).all()
    assert not any(p.requires_grad or p.grad is not None for p in shipped_prior().parameters())  # type: ignore[attr-defined]
