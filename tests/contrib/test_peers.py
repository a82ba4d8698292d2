"""The peers' mathematics against their papers' own coordinates; each trains, resumes and loads."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch
from torch import Tensor, nn

from codefend import purifiers
from codefend.contrib.peers import adbm, flowpure, hgd
from codefend.contrib.peers.flowpure import FlowOptions, FlowPure, FlowPureConfig
from codefend.contrib.peers.hgd import Hgd
from codefend.core import runs
from codefend.purifiers.diffpure import vp_log_mean, vp_sigma
from codefend.purifiers.nets import SHIFT_DATA, NetConfig, PurifierNet, load_net
from codefend.training import train
from codefend.types import CodefendError
from training_kit import generator, parameters, peer_config, small_bank, small_prior

if TYPE_CHECKING:
    from codefend.victims.pocket import Pocket


PEERS = ("hgd", "flowpure", "flowpure-gauss", "adbm", "codefend-r")


def images(seed: int = 0, count: int = 2) -> Tensor:
    return 0.3 + 0.4 * torch.rand(count, 3, 8, 8, generator=generator(seed), dtype=torch.float64)


class Perfect(nn.Module):
    """Predicts the clean image and records its inputs."""

    multiple = 1

    def __init__(self, clean: Tensor, error: float = 0.0) -> None:
        super().__init__()
        self.clean, self.error, self.calls = clean, error, list[tuple[float, float]]()
        self.inputs: list[Tensor] = []

    def forward(self, x: Tensor, s: Tensor, sigma: Tensor) -> Tensor:
        self.calls.append((round(float(s[0]), 6), round(float(sigma[0]), 6)))
        self.inputs.append(x)
        return self.clean + self.error


# --- losses ----------------------------------------------------------------------------------------------------------


def test_flow_loss_is_the_velocitys_squared_error() -> None:
    clean, attacked = images(0), images(0) + 0.03 * torch.randn(2, 3, 8, 8, generator=generator(1), dtype=torch.float64)
    s = torch.tensor([0.25, 0.9], dtype=torch.float64)
    wide = s.view(-1, 1, 1, 1)
    x = (1 - wide) * clean + wide * attacked
    guess = clean + 0.01 * torch.randn(clean.shape, generator=generator(2), dtype=torch.float64)
    velocity, target = (guess - x) / wide, clean - attacked
    expected = (velocity - target).square().flatten(1).mean(1) / SHIFT_DATA**2
    assert torch.allclose(flowpure.flow_loss(lambda *_: guess, clean, attacked, s), expected)


def test_gauss_flow_gives_the_network_the_inputs_of_the_prior() -> None:
    clean, s = images(), torch.tensor([0.5, 0.2], dtype=torch.float64)
    net = Perfect(clean, error=0.01)
    loss = flowpure.gauss_flow_loss(net, clean, s, noise=0.3, generator=generator())
    assert net.calls == [(0.0, 0.15)]
    assert float((net.inputs[0][0] - clean[0]).std()) == pytest.approx(0.15, rel=0.15)
    assert loss.tolist() == pytest.approx([(0.01 / 0.15) ** 2, (0.01 / 0.06) ** 2])


@pytest.mark.parametrize("t", [0.02, 0.11, 0.15])
def test_adbm_is_the_papers_bridge_in_other_coordinates(t: float) -> None:
    # x_t and target as in the paper's code, on [-1, 1] in VP coordinates, with T = 0.15
    clean, attacked = images(0), images(0) + 0.03 * torch.randn(2, 3, 8, 8, generator=generator(1), dtype=torch.float64)
    noise = torch.randn(clean.shape, generator=generator(2), dtype=torch.float64)
    a_t, a_end = (math.exp(2 * float(vp_log_mean(torch.tensor(v, dtype=torch.float64)))) for v in (t, 0.15))
    shift = 2 * (attacked - clean)
    x_t = math.sqrt(a_t) * (2 * clean - 1) + math.sqrt(1 - a_t) * noise
    x_t = x_t + shift * a_end * (1 - a_t) / ((1 - a_end) * math.sqrt(a_t))
    target = noise + shift * math.sqrt(1 / a_t - 1) * a_end / (1 - a_end)

    sigma = vp_sigma(torch.full((2,), t, dtype=torch.float64))
    end = float(vp_sigma(torch.tensor(0.15, dtype=torch.float64)))
    state = adbm.adbm_state(clean, attacked, sigma, end, noise)
    assert torch.allclose(state, (x_t / math.sqrt(a_t) + 1) / 2, atol=1e-9)
    if t == 0.15:  # the far end is what a purifier starts from with the adversarial image
        assert torch.allclose(state, attacked + end * noise, atol=1e-9)

    guess = clean + 0.01 * torch.randn(clean.shape, generator=generator(3), dtype=torch.float64)
    predicted = (x_t - math.sqrt(a_t) * (2 * guess - 1)) / math.sqrt(1 - a_t)  # the noise that `guess` implies
    expected = (predicted - target).square().flatten(1).mean(1)
    assert torch.allclose(adbm.adbm_loss(guess, clean, sigma), expected, rtol=1e-6)


def test_bridge_levels_stay_inside_their_batchs_end() -> None:
    ends = set()
    for seed in range(20):
        sigma, end = adbm.sample_bridge_levels(64, generator=generator(seed))
        assert float(sigma.max()) <= end
        assert float(vp_sigma(torch.tensor(0.1))) <= end <= float(vp_sigma(torch.tensor(0.2)))
        ends.add(end)
    assert len(ends) == 20
    assert adbm.sample_bridge_levels(1, times=(0.15, 0.15))[1] == pytest.approx(float(vp_sigma(torch.tensor(0.15))))


def test_feature_distance_is_relative_l1() -> None:
    clean = torch.tensor([[[1.0, -3.0]], [[0.5, 0.5]]])
    assert hgd.feature_distance(clean + 0.5, clean).tolist() == pytest.approx([0.25, 1.0])
    assert float(hgd.feature_distance(clean, clean).sum()) == 0


def flow(net: nn.Module, **options: Any) -> FlowPure:
    return FlowPure(cast("PurifierNet", net), FlowOptions(**options))


# --- purification ----------------------------------------------------------------------------------------------------


def test_euler_steps_are_those_of_the_velocity() -> None:
    class Shrinking(nn.Module):
        multiple = 1

        def forward(self, x: Tensor, s: Tensor, sigma: Tensor) -> Tensor:
            return 0.5 + 0.6 * (x - 0.5) * (1 - 0.3 * s.view(-1, 1, 1, 1))

    start, net = images(), Shrinking()
    x = start
    for k in range(5):  # x + dt v(x), t = 0, 1/5, ..., as an Euler solver would
        s = torch.full((2,), 1 - k / 5, dtype=torch.float64)
        x = x + (net(x, s, 0 * s) - x) / s.view(-1, 1, 1, 1) / 5
    assert torch.allclose(flow(net, steps=5).denoise(start, None), x)


def test_a_gaussian_flow_starts_at_its_option() -> None:
    clean = images()
    net = Perfect(clean)
    out = flow(net, steps=3, start=0.5, noise=0.3).denoise(clean, generator())
    assert net.calls == [(0.0, 0.15), (0.0, 0.1), (0.0, 0.05)]
    assert float((net.inputs[0] - clean).std()) == pytest.approx(0.15, rel=0.15)
    assert torch.allclose(out, clean)


def test_untrained_peers_are_the_identity_and_know_their_cost() -> None:
    net = PurifierNet(NetConfig(channels=(6, 8), blocks=(1, 1), embedding=16))
    batch = torch.rand(1, 3, 12, 20, generator=generator())
    assert torch.allclose(Hgd(net)(batch), batch, atol=1e-6)
    flow = FlowPure(net, FlowOptions(steps=4))
    assert torch.allclose(flow(batch), batch, atol=1e-6)
    assert (Hgd(net).evaluations, flow.evaluations, flow.stochastic, flow.name) == (1, 4, False, "flowpure:steps=4")
    assert flow.multiply_adds(12, 20) == 4 * Hgd(net).multiply_adds(12, 20) > 0


# --- training --------------------------------------------------------------------------------------------------------


@pytest.fixture
def prior(tmp_path: Path) -> Path:
    return small_prior(tmp_path / "prior")


@pytest.fixture
def bank(tmp_path: Path) -> Path:
    return small_bank(tmp_path / "bank")


@pytest.mark.weights
@pytest.mark.parametrize("name", PEERS)
def test_a_peer_trains_and_loads(
    name: str, prior: Path, bank: Path, tmp_path: Path, bare_pocket: Pocket, monkeypatch: pytest.MonkeyPatch
) -> None:
    from codefend import victims

    monkeypatch.setattr(victims, "load", lambda name: bare_pocket)
    folder = train(peer_config(name, prior, bank, mining_steps=1), tmp_path / name)
    purifier = purifiers.load(folder)
    assert load_net(folder)[1]["kind"] == name
    assert type(purifier).__name__ in ("Hgd", "FlowPure", "DiffPure")
    rows = runs.read_rows(tmp_path / name)
    assert [row["step"] for row in rows] == [1, 2]
    assert all(value is not None for row in rows for value in row.values())  # nan is written as null
    assert rows[0]["grad_norm"] > 0
    card = (folder / "README.md").read_text()
    assert "2 of 2 steps" in card
    assert ("PGD-3 on features on lite2 (4 pairs, 4.0 to 4.0/255)" in card) is (
        name in ("hgd", "flowpure", "codefend-r")
    )
    assert ("in the loop" in card) is (name == "adbm")


def test_an_interrupted_peer_equals_an_uninterrupted_one(
    prior: Path, bank: Path, tmp_path: Path, interrupt: Callable[[Callable[[], object], int], None]
) -> None:
    chosen = peer_config("flowpure", prior, bank, steps=4, save_every=2)
    whole = train(chosen, tmp_path / "whole")
    interrupt(lambda: train(chosen, tmp_path / "cut"), 4)
    assert "2 of 4 steps" in (tmp_path / "cut" / "weights" / "README.md").read_text()
    cut = train(chosen, tmp_path / "cut")
    assert torch.equal(parameters(whole), parameters(cut))
    assert not torch.equal(parameters(whole), parameters(prior))


def test_a_peer_cut_short_behind_its_last_checkpoint_has_its_weights(
    prior: Path, bank: Path, tmp_path: Path, interrupt_saved: Callable[..., None]
) -> None:
    chosen = peer_config("flowpure", prior, bank, steps=4, save_every=2)
    whole = train(chosen, tmp_path / "whole")
    interrupt_saved(lambda: train(chosen, tmp_path / "cut"), 4)
    assert torch.equal(parameters(whole), parameters(train(chosen, tmp_path / "cut")))


def test_static_peers_need_pairs(prior: Path, tmp_path: Path) -> None:
    with pytest.raises(CodefendError, match="codefend pairs"):
        train(FlowPureConfig(prior=str(prior)), tmp_path / "run")
