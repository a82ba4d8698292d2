from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from codefend.purifiers import diffusion as d


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Recorder:
    """A perfect predictor that records its inputs."""

    def __init__(self, clean: Tensor) -> None:
        self.clean, self.calls = clean, list[tuple[float, float]]()

    def __call__(self, x: Tensor, s: Tensor, sigma: Tensor) -> Tensor:
        self.calls.append((float(s[0]), float(sigma[0])))
        return self.clean


def gaussian_denoiser(x: Tensor, s: Tensor, sigma: Tensor) -> Tensor:
    """Exact for pixels that are independently N(0.5, 0.25^2)."""
    skip = (0.0625 / (0.0625 + sigma**2)).view(-1, 1, 1, 1)
    return 0.5 + skip * (x - 0.5)


# --- schedules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("t", "alpha_bar"), [(0.1, 0.896282), (0.15, 0.787513), (0.3, 0.396333)])
def test_vp_sigma_matches_the_closed_form_by_hand(t: float, alpha_bar: float) -> None:
    # alpha_bar = exp(-0.5 * 19.9 t^2 - 0.1 t), computed with a pocket calculator
    assert float(torch.exp(2 * d.vp_log_mean(torch.tensor(t)))) == pytest.approx(alpha_bar, abs=2e-6)
    assert float(d.vp_sigma(torch.tensor(t))) == pytest.approx(math.sqrt((1 - alpha_bar) / alpha_bar) / 2, rel=1e-4)


def test_vp_sigma_matches_the_discrete_ddpm_schedule() -> None:
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[149]
    expected = ((1 - alpha_bar) / alpha_bar).sqrt() / 2
    assert float(d.vp_sigma(torch.tensor(0.15))) == pytest.approx(float(expected), rel=0.01)


def test_diffpure_levels_fall_to_exactly_zero() -> None:
    levels = d.diffpure_levels(0.15, 150)
    assert levels.shape == (151,)
    assert float(levels[-1]) == 0.0
    assert bool((levels[1:] < levels[:-1]).all())


def test_preconditioning_is_edm_without_a_shift() -> None:
    sigma = torch.tensor([0.01, 0.25, 0.6], dtype=torch.float64)
    scales = d.preconditioning(torch.zeros_like(sigma), sigma, sigma_data=0.25)
    total = sigma**2 + 0.0625
    assert torch.allclose(scales.c_skip, 0.0625 / total)
    assert torch.allclose(scales.c_out, sigma * 0.25 / total.sqrt(), rtol=1e-4)
    assert torch.allclose(scales.c_in, total.rsqrt())
    assert torch.allclose(scales.c_noise, sigma.log() / 4, atol=1e-4)


def test_preconditioning_gives_unit_variance_with_a_shift() -> None:
    n = 400_000
    clean, shift, noise = (torch.randn(n, generator=gen(k)) for k in range(3))
    s, sigma = torch.tensor([0.7]), torch.tensor([0.05])
    x = 0.25 * clean + 0.7 * d.SHIFT_DATA * shift + 0.05 * noise
    scales = d.preconditioning(s, sigma)
    assert float((scales.c_in * x).var()) == pytest.approx(1, rel=0.01)
    assert float(((0.25 * clean - scales.c_skip * x) / scales.c_out).var()) == pytest.approx(1, rel=0.01)


def test_preconditioning_leaves_noise_free_images_alone() -> None:
    scales = d.preconditioning(torch.tensor([0.0, 1.0]), torch.zeros(2))
    assert scales.c_skip.tolist() == [1.0, 1.0]
    assert float(scales.c_out[0]) < 2e-6
    assert float(scales.c_out[1]) == pytest.approx(8 / 255, rel=1e-3)


# --- prior -----------------------------------------------------------------------------------------------------------


def test_prior_loss_of_the_wiener_gain_is_one_at_every_level() -> None:
    clean = 0.5 + 0.25 * torch.randn(4, 3, 64, 64, generator=gen())
    loss = d.prior_loss(gaussian_denoiser, clean, torch.tensor([0.01, 0.1, 0.3, 0.6]), generator=gen(1))
    assert loss.shape == (4,)
    assert torch.allclose(loss, torch.ones(4), atol=0.05)


def test_sampled_sigmas_cover_the_purification_range() -> None:
    sigmas = d.sample_sigmas(4000, generator=gen())
    assert float(sigmas.min()) >= 2e-3
    assert float(sigmas.max()) == pytest.approx(0.65)
    assert float(sigmas.max()) > float(d.vp_sigma(torch.tensor(0.3)))
    assert float((sigmas > float(d.vp_sigma(torch.tensor(0.1)))).float().mean()) > 0.2


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_reverse_process_keeps_the_data_distribution(eta: float) -> None:
    clean = 0.5 + 0.25 * torch.randn(8, 3, 48, 48, generator=gen())
    levels = d.diffpure_levels(0.3, 150)
    noisy = clean + float(levels[0]) * torch.randn(clean.shape, generator=gen(1))
    out = d.denoise_from(gaussian_denoiser, noisy, levels, eta=eta, generator=gen(2))
    assert float(out.std()) == pytest.approx(0.25, rel=0.02)
    assert float(out.mean()) == pytest.approx(0.5, abs=0.01)


def test_diffpure_returns_a_perfect_prediction_and_counts_its_steps() -> None:
    clean = torch.rand(2, 3, 8, 8, generator=gen())
    net = Recorder(clean)
    out = d.diffpure(net, clean, t=0.15, steps=7, generator=gen())
    assert torch.equal(out, clean)
    assert len(net.calls) == 7
    assert all(s == 0 for s, _ in net.calls)
    assert net.calls[0][1] == pytest.approx(float(d.vp_sigma(torch.tensor(0.15))), rel=1e-5)


def test_ancestral_noise_is_seeded_and_ddim_draws_none_after_the_start() -> None:
    images = torch.rand(1, 3, 8, 8, generator=gen())
    runs = [d.diffpure(gaussian_denoiser, images, t=0.1, steps=5, generator=gen(k)) for k in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    levels, noisy = d.diffpure_levels(0.1, 5), images + 0.1
    pair = [d.denoise_from(gaussian_denoiser, noisy, levels, eta=0.0, generator=gen(k)) for k in (1, 2)]
    assert torch.equal(pair[0], pair[1])


# --- bridge ----------------------------------------------------------------------------------------------------------


def test_bridge_ends_at_the_clean_image_and_at_the_attacked_one() -> None:
    clean, attacked = torch.rand(2, 2, 3, 8, 8, generator=gen())
    at0, level0 = d.bridge_state(clean, attacked, torch.zeros(2), 0.1, gamma=0.05, generator=gen())
    at1, level1 = d.bridge_state(clean, attacked, torch.ones(2), 0.0, gamma=0.05, generator=gen())
    noisy, level = d.bridge_state(clean, attacked, torch.ones(2), torch.tensor([0.0, 0.1]), generator=gen())
    assert torch.equal(at0, clean)
    assert torch.allclose(at1, attacked, atol=1e-6)
    assert level0.tolist() == [0, 0]
    assert level1.tolist() == [0, 0]
    assert torch.allclose(level, torch.tensor([0.0, 0.1]))
    assert float((noisy[1] - attacked[1]).std()) == pytest.approx(0.1, rel=0.2)


def test_bridge_level_is_the_noise_that_is_really_there() -> None:
    clean = torch.zeros(1, 3, 200, 200)
    x, level = d.bridge_state(clean, clean, torch.tensor([0.5]), 0.08, gamma=0.06, generator=gen())
    assert float(level) == pytest.approx(math.hypot(0.5 * 0.08, 0.06 * 0.5))
    assert float(x.std()) == pytest.approx(float(level), rel=0.01)


def test_charbonnier_is_per_example_and_zero_for_a_perfect_predictor() -> None:
    clean, attacked = torch.rand(2, 3, 3, 8, 8, generator=gen())
    s = torch.tensor([0.2, 0.9, 1.0])
    prediction = d.bridge_predict(Recorder(clean), clean, attacked, s)
    assert torch.equal(d.charbonnier(prediction, clean), torch.zeros(3))
    off = clean + torch.tensor([0.0, 0.1, 0.5]).view(3, 1, 1, 1)
    loss = d.charbonnier(d.bridge_predict(Recorder(off), clean, attacked, s), clean)
    assert torch.allclose(loss, torch.tensor([0.0, 0.1, 0.5]), atol=1.1e-3)


def test_sampled_bridge_times_and_sigmas_have_their_atoms() -> None:
    s = d.sample_bridge_times(4000, generator=gen())
    sigma = d.sample_bridge_sigmas(4000, generator=gen())
    assert float((s == 1).float().mean()) == pytest.approx(0.5, abs=0.03)
    assert float((sigma == 0).float().mean()) == pytest.approx(0.4, abs=0.03)
    assert float(sigma.max()) <= 0.25
    assert 0 <= float(s.min()) < 0.05


@pytest.mark.parametrize("evaluations", [1, 2, 3, 4])
def test_any_number_of_evaluations_agrees_for_a_perfect_predictor(evaluations: int) -> None:
    clean, attacked = torch.rand(2, 1, 3, 8, 8, generator=gen())
    net = Recorder(clean)
    out = d.bridge_purify(net, attacked, evaluations=evaluations, sigma=0.2, generator=gen())
    assert torch.allclose(out, clean, atol=1e-6)
    halves = [(0.5**k, 0.2 * 0.5**k) for k in range(evaluations)]
    assert net.calls == [pytest.approx(call) for call in halves]


def test_bridge_walks_the_line_between_the_image_and_the_prediction() -> None:
    inputs: list[Tensor] = []

    def net(x: Tensor, s: Tensor, sigma: Tensor) -> Tensor:
        inputs.append(x)
        return torch.zeros_like(x)

    d.bridge_purify(net, torch.ones(1, 3, 2, 2), evaluations=3)
    assert [float(x.mean()) for x in inputs] == [1.0, 0.5, 0.25]


def test_recomputing_gives_the_same_gradient() -> None:
    images = torch.rand(1, 3, 8, 8, generator=gen())
    grads = []
    for checkpoint in (False, True):
        x = images.clone().requires_grad_()
        d.diffpure(
            gaussian_denoiser, x, t=0.1, steps=4, checkpoint=checkpoint, generator=gen()
        ).square().sum().backward()
        grads.append(x.grad)
    assert grads[0] is not None
    assert grads[1] is not None
    assert torch.equal(grads[0], grads[1])
    assert float(grads[0].abs().max()) > 0
