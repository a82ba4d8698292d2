"""The peers' mathematics against their papers' own coordinates, and what each trains and how it walks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from codefend.contrib.peers import adbm, flowpure, hgd
from codefend.contrib.peers.flowpure import FlowOptions, FlowPure
from codefend.contrib.peers.hgd import Hgd
from codefend.purifiers.diffusion import SHIFT_DATA, vp_log_mean, vp_sigma
from codefend.purifiers.nets import NetConfig, PurifierNet


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(seed: int = 0, count: int = 2) -> Tensor:
    return 0.3 + 0.4 * torch.rand(count, 3, 8, 8, generator=gen(seed), dtype=torch.float64)


class Perfect:
    """Predicts the clean image and remembers how it was asked."""

    def __init__(self, clean: Tensor, error: float = 0.0) -> None:
        self.clean, self.error, self.calls = clean, error, list[tuple[float, float]]()
        self.seen: list[Tensor] = []

    def __call__(self, x: Tensor, s: Tensor, sigma: Tensor) -> Tensor:
        self.calls.append((round(float(s[0]), 6), round(float(sigma[0]), 6)))
        self.seen.append(x)
        return self.clean + self.error


# --- losses ----------------------------------------------------------------------------------------------------------


def test_flow_loss_is_the_velocitys_squared_error() -> None:
    clean, attacked = pictures(0), pictures(0) + 0.03 * torch.randn(2, 3, 8, 8, generator=gen(1), dtype=torch.float64)
    s = torch.tensor([0.25, 0.9], dtype=torch.float64)
    wide = s.view(-1, 1, 1, 1)
    x = (1 - wide) * clean + wide * attacked
    guess = clean + 0.01 * torch.randn(clean.shape, generator=gen(2), dtype=torch.float64)
    velocity, wanted = (guess - x) / wide, clean - attacked
    expected = (velocity - wanted).square().flatten(1).mean(1) / SHIFT_DATA**2
    assert torch.allclose(flowpure.flow_loss(lambda *_: guess, clean, attacked, s), expected)


def test_gauss_flow_asks_the_network_as_the_prior_is_asked() -> None:
    clean, s = pictures(), torch.tensor([0.5, 0.2], dtype=torch.float64)
    net = Perfect(clean, error=0.01)
    loss = flowpure.gauss_flow_loss(net, clean, s, noise=0.3, generator=gen())
    assert net.calls == [(0.0, 0.15)]
    assert float((net.seen[0][0] - clean[0]).std()) == pytest.approx(0.15, rel=0.15)
    assert loss.tolist() == pytest.approx([(0.01 / 0.15) ** 2, (0.01 / 0.06) ** 2])


@pytest.mark.parametrize("t", [0.02, 0.11, 0.15])
def test_adbm_is_the_papers_bridge_in_other_coordinates(t: float) -> None:
    # x_t and target as the paper's code writes them, on [-1, 1] in VP coordinates, with T = 0.15
    clean, attacked = pictures(0), pictures(0) + 0.03 * torch.randn(2, 3, 8, 8, generator=gen(1), dtype=torch.float64)
    noise = torch.randn(clean.shape, generator=gen(2), dtype=torch.float64)
    a_t, a_end = (math.exp(2 * float(vp_log_mean(torch.tensor(v, dtype=torch.float64)))) for v in (t, 0.15))
    shift = 2 * (attacked - clean)
    x_t = math.sqrt(a_t) * (2 * clean - 1) + math.sqrt(1 - a_t) * noise
    x_t = x_t + shift * a_end * (1 - a_t) / ((1 - a_end) * math.sqrt(a_t))
    target = noise + shift * math.sqrt(1 / a_t - 1) * a_end / (1 - a_end)

    sigma = vp_sigma(torch.full((2,), t, dtype=torch.float64))
    end = float(vp_sigma(torch.tensor(0.15, dtype=torch.float64)))
    state = adbm.adbm_state(clean, attacked, sigma, end, noise)
    assert torch.allclose(state, (x_t / math.sqrt(a_t) + 1) / 2, atol=1e-9)
    if t == 0.15:  # the far end is what a purifier makes of the attacked picture
        assert torch.allclose(state, attacked + end * noise, atol=1e-9)

    guess = clean + 0.01 * torch.randn(clean.shape, generator=gen(3), dtype=torch.float64)
    said = (x_t - math.sqrt(a_t) * (2 * guess - 1)) / math.sqrt(1 - a_t)  # the noise that predicting `guess` means
    expected = (said - target).square().flatten(1).mean(1)
    assert torch.allclose(adbm.adbm_loss(guess, clean, sigma), expected, rtol=1e-6)


def test_bridge_levels_stay_inside_their_batchs_end() -> None:
    ends = set()
    for seed in range(20):
        sigma, end = adbm.sample_bridge_levels(64, generator=gen(seed))
        assert float(sigma.max()) <= end
        assert float(vp_sigma(torch.tensor(0.1))) <= end <= float(vp_sigma(torch.tensor(0.2)))
        ends.add(end)
    assert len(ends) == 20
    assert adbm.sample_bridge_levels(1, times=(0.15, 0.15))[1] == pytest.approx(float(vp_sigma(torch.tensor(0.15))))


def test_feature_distance_is_relative_l1() -> None:
    right = torch.tensor([[[1.0, -3.0]], [[0.5, 0.5]]])
    assert hgd.feature_distance(right + 0.5, right).tolist() == pytest.approx([0.25, 1.0])
    assert float(hgd.feature_distance(right, right).sum()) == 0


# --- walks -----------------------------------------------------------------------------------------------------------


def test_euler_steps_are_those_of_the_velocity() -> None:
    start = pictures()

    def net(x: Tensor, s: Tensor, sigma: Tensor) -> Tensor:
        return 0.5 + 0.6 * (x - 0.5) * (1 - 0.3 * s.view(-1, 1, 1, 1))

    x = start
    for k in range(5):  # x + dt v(x), t = 0, 1/5, ..., as an Euler solver would
        s = torch.full((2,), 1 - k / 5, dtype=torch.float64)
        x = x + (net(x, s, 0 * s) - x) / s.view(-1, 1, 1, 1) / 5
    assert torch.allclose(flowpure.flow_purify(net, start, FlowOptions(steps=5)), x)


def test_a_gaussian_flow_starts_where_it_is_told() -> None:
    clean = pictures()
    net = Perfect(clean)
    out = flowpure.flow_purify(net, clean, FlowOptions(steps=3, start=0.5, noise=0.3), generator=gen())
    assert net.calls == [(0.0, 0.15), (0.0, 0.1), (0.0, 0.05)]
    assert float((net.seen[0] - clean).std()) == pytest.approx(0.15, rel=0.15)
    assert torch.allclose(out, clean)


def test_untrained_peers_leave_pictures_alone_and_say_what_they_cost() -> None:
    net = PurifierNet(NetConfig(channels=(6, 8), blocks=(1, 1), embedding=16))
    images = torch.rand(1, 3, 12, 20, generator=gen())
    assert torch.allclose(Hgd(net)(images), images, atol=1e-6)
    flow = FlowPure(net, FlowOptions(steps=4))
    assert torch.allclose(flow(images), images, atol=1e-6)
    assert (Hgd(net).evaluations, flow.evaluations, flow.stochastic, flow.name) == (1, 4, False, "flowpure:steps=4")
    assert flow.multiply_adds(12, 20) == 4 * Hgd(net).multiply_adds(12, 20) > 0
