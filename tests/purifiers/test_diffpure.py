from __future__ import annotations

import math
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from codefend.purifiers.diffpure import DiffPure, DiffPureOptions, denoise_from, diffpure_levels, vp_log_mean, vp_sigma
from codefend.purifiers.nets import PurifierNet
from purifiers_kit import Recorder, gen


class GaussianDenoiser(nn.Module):
    """Exact for pixels that are independently N(0.5, 0.25^2)."""

    multiple = 1

    def forward(self, x: Tensor, s: Tensor, sigma: Tensor) -> Tensor:
        skip = (0.0625 / (0.0625 + sigma**2)).view(-1, 1, 1, 1)
        return 0.5 + skip * (x - 0.5)


def diffpure(net: nn.Module, **options: Any) -> DiffPure:
    return DiffPure(cast("PurifierNet", net), DiffPureOptions(**options))


@pytest.mark.parametrize(("t", "alpha_bar"), [(0.1, 0.896282), (0.15, 0.787513), (0.3, 0.396333)])
def test_vp_sigma_matches_the_closed_form_by_hand(t: float, alpha_bar: float) -> None:
    # alpha_bar = exp(-0.5 * 19.9 t^2 - 0.1 t), computed with a pocket calculator
    assert float(torch.exp(2 * vp_log_mean(torch.tensor(t)))) == pytest.approx(alpha_bar, abs=2e-6)
    assert float(vp_sigma(torch.tensor(t))) == pytest.approx(math.sqrt((1 - alpha_bar) / alpha_bar) / 2, rel=1e-4)


def test_vp_sigma_matches_the_discrete_ddpm_schedule() -> None:
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[149]
    expected = ((1 - alpha_bar) / alpha_bar).sqrt() / 2
    assert float(vp_sigma(torch.tensor(0.15))) == pytest.approx(float(expected), rel=0.01)


def test_diffpure_levels_fall_to_exactly_zero() -> None:
    levels = diffpure_levels(0.15, 150)
    assert levels.shape == (151,)
    assert float(levels[-1]) == 0.0
    assert bool((levels[1:] < levels[:-1]).all())


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_reverse_process_keeps_the_data_distribution(eta: float) -> None:
    clean = 0.5 + 0.25 * torch.randn(8, 3, 48, 48, generator=gen())
    levels = diffpure_levels(0.3, 150)
    noisy = clean + float(levels[0]) * torch.randn(clean.shape, generator=gen(1))
    out = denoise_from(GaussianDenoiser(), noisy, levels, eta=eta, generator=gen(2))
    assert float(out.std()) == pytest.approx(0.25, rel=0.02)
    assert float(out.mean()) == pytest.approx(0.5, abs=0.01)


def test_diffpure_returns_a_perfect_prediction_and_counts_its_steps() -> None:
    clean = torch.rand(2, 3, 8, 8, generator=gen())
    net = Recorder(clean)
    out = diffpure(net, t=0.15, steps=7).denoise(clean, gen())
    assert torch.equal(out, clean)
    assert len(net.calls) == 7
    assert all(s == 0 for s, _ in net.calls)
    assert net.calls[0][1] == pytest.approx(float(vp_sigma(torch.tensor(0.15))), rel=1e-5)


def test_ancestral_noise_is_seeded_and_ddim_draws_none_after_the_start() -> None:
    images = torch.rand(1, 3, 8, 8, generator=gen())
    runs = [diffpure(GaussianDenoiser(), t=0.1, steps=5).denoise(images, gen(k)) for k in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    levels, noisy = diffpure_levels(0.1, 5), images + 0.1
    pair = [denoise_from(GaussianDenoiser(), noisy, levels, eta=0.0, generator=gen(k)) for k in (1, 2)]
    assert torch.equal(pair[0], pair[1])


def test_recomputing_gives_the_same_gradient() -> None:
    images = torch.rand(1, 3, 8, 8, generator=gen())
    grads = []
    for checkpoint in (False, True):
        x = images.clone().requires_grad_()
        diffpure(GaussianDenoiser(), t=0.1, steps=4, checkpoint=checkpoint).denoise(x, gen()).square().sum().backward()
        grads.append(x.grad)
    assert grads[0] is not None
    assert grads[1] is not None
    assert torch.equal(grads[0], grads[1])
    assert float(grads[0].abs().max()) > 0
