from __future__ import annotations

import math
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from codefend.purifiers.bridge import (
    Bridge,
    BridgeOptions,
    bridge_state,
    charbonnier,
    sample_bridge_sigmas,
    sample_bridge_times,
)
from codefend.purifiers.nets import PurifierNet
from purifiers_kit import Recorder, gen


def bridge(net: nn.Module, **options: Any) -> Bridge:
    return Bridge(cast("PurifierNet", net), BridgeOptions(**options))


def test_bridge_ends_at_the_clean_image_and_at_the_attacked_one() -> None:
    clean, attacked = torch.rand(2, 2, 3, 8, 8, generator=gen())
    at0, level0 = bridge_state(clean, attacked, torch.zeros(2), 0.1, gamma=0.05, generator=gen())
    at1, level1 = bridge_state(clean, attacked, torch.ones(2), 0.0, gamma=0.05, generator=gen())
    noisy, level = bridge_state(clean, attacked, torch.ones(2), torch.tensor([0.0, 0.1]), generator=gen())
    assert torch.equal(at0, clean)
    assert torch.allclose(at1, attacked, atol=1e-6)
    assert level0.tolist() == [0, 0]
    assert level1.tolist() == [0, 0]
    assert torch.allclose(level, torch.tensor([0.0, 0.1]))
    assert float((noisy[1] - attacked[1]).std()) == pytest.approx(0.1, rel=0.2)


def test_bridge_level_is_the_noise_that_is_really_there() -> None:
    clean = torch.zeros(1, 3, 200, 200)
    x, level = bridge_state(clean, clean, torch.tensor([0.5]), 0.08, gamma=0.06, generator=gen())
    assert float(level) == pytest.approx(math.hypot(0.5 * 0.08, 0.06 * 0.5))
    assert float(x.std()) == pytest.approx(float(level), rel=0.01)


def test_charbonnier_is_per_example_and_zero_for_equal_images() -> None:
    clean = torch.rand(3, 3, 8, 8, generator=gen())
    assert torch.equal(charbonnier(clean, clean), torch.zeros(3))
    off = clean + torch.tensor([0.0, 0.1, 0.5]).view(3, 1, 1, 1)
    loss = charbonnier(off, clean)
    assert torch.allclose(loss, torch.tensor([0.0, 0.1, 0.5]), atol=1.1e-3)


def test_sampled_bridge_times_and_sigmas_have_their_atoms() -> None:
    s = sample_bridge_times(4000, generator=gen())
    sigma = sample_bridge_sigmas(4000, generator=gen())
    assert float((s == 1).float().mean()) == pytest.approx(0.5, abs=0.03)
    assert float((sigma == 0).float().mean()) == pytest.approx(0.4, abs=0.03)
    assert float(sigma.max()) <= 0.25
    assert 0 <= float(s.min()) < 0.05


@pytest.mark.parametrize("evaluations", [1, 2, 3, 4])
def test_any_number_of_evaluations_agrees_for_a_perfect_predictor(evaluations: int) -> None:
    clean, attacked = torch.rand(2, 1, 3, 8, 8, generator=gen())
    net = Recorder(clean)
    out = bridge(net, evaluations=evaluations, sigma=0.2).denoise(attacked, gen())
    assert torch.allclose(out, clean, atol=1e-6)
    halves = [(0.5**k, 0.2 * 0.5**k) for k in range(evaluations)]
    assert net.calls == [pytest.approx(call) for call in halves]


def test_bridge_walks_the_line_between_the_image_and_the_prediction() -> None:
    inputs: list[Tensor] = []

    class Black(Recorder):
        def forward(self, x: Tensor, s: Tensor, sigma: Tensor) -> Tensor:
            inputs.append(x)
            return torch.zeros_like(x)

    bridge(Black(torch.zeros(0)), evaluations=3).denoise(torch.ones(1, 3, 2, 2), None)
    assert [float(x.mean()) for x in inputs] == [1.0, 0.5, 0.25]
