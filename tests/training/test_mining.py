"""The attack in a training loop."""

from __future__ import annotations

import torch
from torch import Tensor

from codefend.purifiers.nets import NetConfig, PurifierNet
from codefend.training.mining import mine, n_fgsm, sign_steps
from training_kit import generator


def test_sign_steps_descend_inside_each_images_budget() -> None:
    clean = torch.rand(3, 3, 8, 8, generator=generator())
    eps = torch.tensor([1 / 255, 4 / 255, 16 / 255])
    weight = torch.randn(clean.shape, generator=generator(1))
    calls = []

    def objective(images: Tensor) -> Tensor:
        calls.append(images.requires_grad)
        return (weight * images).flatten(1).sum(1)

    attacked = sign_steps(objective, clean, eps=eps, steps=3, rel_step=1.0, generator=generator(2))
    distance = (attacked - clean).abs().flatten(1).amax(1)
    assert calls == [True] * 3  # one evaluation a step
    assert torch.allclose(distance, eps, atol=1e-6)
    assert 0 <= float(attacked.min()) <= float(attacked.max()) <= 1
    optimum = (clean - eps.view(-1, 1, 1, 1) * weight.sign()).clamp(0, 1)  # three steps of eps cross the whole ball
    assert torch.allclose(attacked, optimum, atol=1e-6)


def test_n_fgsm_lowers_the_objective_through_the_network_and_leaves_it_trainable() -> None:
    torch.manual_seed(0)
    net = PurifierNet(NetConfig(channels=(6, 8), blocks=(1, 1), embedding=16))
    clean, target = torch.rand(4, 3, 32, 32), torch.rand(4, 3, 32, 32)
    eps, sigma = torch.full((4,), 0.02), torch.tensor([0.0, 0.0, 0.05, 0.05])

    def objective(images: Tensor) -> Tensor:
        return (images - target).square().flatten(1).mean(1)

    attacked = n_fgsm(net, objective, clean, eps=eps, sigma=sigma, start=1.0, generator=generator())
    assert bool((objective(attacked) < objective(clean)).all())
    assert 0.02 < float((attacked - clean).abs().max()) <= 0.04 + 1e-6  # start and step, not projected
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_mining_takes_a_noise_level_for_each_image() -> None:
    torch.manual_seed(0)
    net = PurifierNet(NetConfig(channels=(6, 8), blocks=(1, 1), embedding=16))
    clean, target = torch.rand(4, 3, 32, 32), torch.rand(4, 3, 32, 32)
    eps, sigma = torch.full((4,), 0.02), torch.tensor([0.0, 0.0, 0.2, 0.2])
    seen: list[Tensor] = []

    def objective(images: Tensor) -> Tensor:
        seen.append(images.detach())
        return (images - target).square().flatten(1).mean(1)

    attacked = mine(net, objective, clean, eps=eps, sigma=sigma, steps=2, lean=True, generator=generator())
    assert float((attacked - clean).abs().max()) <= 0.02 + 1e-6
    change = (seen[0] - clean).abs().mean((1, 2, 3))
    assert float(change[2:].min()) > 3 * float(change[:2].max())  # an untrained network passes the noise
