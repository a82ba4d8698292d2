"""A larger network has nearly the outputs of the small one, and every new weight can learn."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from codefend.purifiers.nets import NetConfig, PurifierNet
from codefend.training.bridge import BridgeConfig, start_from_prior
from codefend.training.nets import grow
from codefend.types import CodefendError

SMALL = NetConfig(channels=(8, 12), blocks=(1, 1), embedding=16)


def trained_net() -> PurifierNet:
    """A small network without layers of zeros."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        net = PurifierNet(SMALL)
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return net


def outputs(net: PurifierNet) -> Tensor:
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    out: Tensor = net(images, torch.tensor([1.0, 0.5]), torch.tensor([0.0, 0.1]))
    return out


def test_new_blocks_change_nothing() -> None:
    net = grow(trained_net(), blocks=(2, 3))
    assert [len(stage.blocks) for stage in net.up_blocks] == [2, 3]  # type: ignore[arg-type, union-attr]
    assert torch.allclose(outputs(net), outputs(trained_net()), atol=1e-6)


def test_new_channels_change_little() -> None:
    wide = grow(trained_net(), channels=(12, 20))
    assert wide.config == replace(SMALL, channels=(12, 20))
    with torch.no_grad():
        small, large, untrained = (outputs(net) for net in (trained_net(), wide, PurifierNet(SMALL)))
    assert float((large - small).norm()) < 0.35 * float((untrained - small).norm())


def test_every_new_weight_learns() -> None:
    net = grow(trained_net(), channels=(12, 20), blocks=(2, 1))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(3):  # layers that write new channels learn first, then those that read them
        optimizer.zero_grad()
        outputs(net).square().mean().backward()
        optimizer.step()
    constant = [name for name, p in net.named_parameters() if p.grad is None or not bool(p.grad.abs().sum())]
    assert constant == []
    assert net.head.weight.grad is not None
    assert float(net.head.weight.grad[:, 8:].abs().min()) > 0


def test_a_network_of_the_same_size_is_returned_itself() -> None:
    small = trained_net()
    assert grow(small) is small
    assert grow(small, channels=(8, 12), blocks=(1, 1)) is small


@pytest.mark.parametrize("channels", [(8,), (8, 12, 16), (6, 12)])
def test_a_network_does_not_shrink(channels: tuple[int, ...]) -> None:
    with pytest.raises(CodefendError, match="only grows"):
        grow(trained_net(), channels=channels)


def test_a_bridge_can_start_in_a_larger_network() -> None:
    net = start_from_prior(BridgeConfig(channels=(24, 48, 96, 200), blocks=(1, 1, 2, 2)))
    assert (net.config.channels, net.config.blocks) == ((24, 48, 96, 200), (1, 1, 2, 2))
    assert "channels" not in BridgeConfig().recorded()
