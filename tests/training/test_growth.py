"""A grown network does nearly what the small one did, and every new weight can learn."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from codefend.purifiers.nets import NetConfig, PurifierNet
from codefend.training.bridge import BridgeConfig, start_from_prior
from codefend.training.growth import grown
from codefend.types import CodefendError

SMALL = NetConfig(channels=(8, 12), blocks=(1, 1), embedding=16)


def trained() -> PurifierNet:
    """A small network none of whose layers is zero any more."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        net = PurifierNet(SMALL)
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return net


def restored(net: PurifierNet) -> Tensor:
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    out: Tensor = net(images, torch.tensor([1.0, 0.5]), torch.tensor([0.0, 0.1]))
    return out


def test_new_blocks_change_nothing() -> None:
    net = grown(trained(), blocks=(2, 3))
    assert [len(stage.blocks) for stage in net.up_blocks] == [2, 3]  # type: ignore[arg-type, union-attr]
    assert torch.allclose(restored(net), restored(trained()), atol=1e-6)


def test_new_channels_change_little() -> None:
    wide = grown(trained(), channels=(12, 20))
    assert wide.config == replace(SMALL, channels=(12, 20))
    with torch.no_grad():
        small, large, untrained = (restored(net) for net in (trained(), wide, PurifierNet(SMALL)))
    assert float((large - small).norm()) < 0.35 * float((untrained - small).norm())


def test_all_that_is_new_learns() -> None:
    net = grown(trained(), channels=(12, 20), blocks=(2, 1))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(3):  # what writes to new channels learns first, then what reads them
        optimizer.zero_grad()
        restored(net).square().mean().backward()
        optimizer.step()
    still = [name for name, p in net.named_parameters() if p.grad is None or not bool(p.grad.abs().sum())]
    assert still == []
    assert net.head.weight.grad is not None
    assert float(net.head.weight.grad[:, 8:].abs().min()) > 0


def test_a_network_as_it_is_comes_back() -> None:
    small = trained()
    assert grown(small) is small
    assert grown(small, channels=(8, 12), blocks=(1, 1)) is small


@pytest.mark.parametrize("channels", [(8,), (8, 12, 16), (6, 12)])
def test_a_network_does_not_shrink(channels: tuple[int, ...]) -> None:
    with pytest.raises(CodefendError, match="only grows"):
        grown(trained(), channels=channels)


def test_a_training_can_ask_for_it() -> None:
    started = start_from_prior(BridgeConfig(channels=(24, 48, 96, 200), blocks=(1, 1, 2, 2)))
    assert (started.config.channels, started.config.blocks) == ((24, 48, 96, 200), (1, 1, 2, 2))
    assert "channels" not in BridgeConfig().recorded()
