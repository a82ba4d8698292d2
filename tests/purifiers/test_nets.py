from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from codefend.core import images
from codefend.purifiers.bridge import bridge_state, charbonnier
from codefend.purifiers.nets import (
    CONFIG_FILE,
    SHIFT_DATA,
    WEIGHTS_FILE,
    NetConfig,
    PurifierNet,
    load_net,
    preconditioning,
    save_net,
)
from codefend.training.prior import prior_loss
from codefend.types import CodefendError

TINY = NetConfig(channels=(8, 12), blocks=(1, 1), embedding=16)


def test_a_purifier_whose_weights_are_not_finite_is_refused_in_one_line(
    tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    net = PurifierNet(TINY)
    next(net.parameters()).data.view(-1)[0] = torch.nan
    save_net(tmp_path / "w", net, kind="bridge")
    images.save(tmp_path / "a.png", torch.rand(3, 8, 8))
    code, out, err = run("purify", tmp_path / "a.png", "-o", tmp_path / "b.png", "--purifier", tmp_path / "w")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "holds NaN or infinity" in err
    assert not (tmp_path / "b.png").exists()


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_net(config: NetConfig = TINY, scale: float = 0.1, seed: int = 0) -> PurifierNet:
    """A network whose zero-initialized layers are filled, so that every path matters."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)  # the layers' own initialization has no generator argument
        net, source = PurifierNet(config), gen(seed)
        for parameter in net.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=source))
    return net


def test_preconditioning_is_edm_without_a_shift() -> None:
    sigma = torch.tensor([0.01, 0.25, 0.6], dtype=torch.float64)
    scales = preconditioning(torch.zeros_like(sigma), sigma, sigma_data=0.25)
    total = sigma**2 + 0.0625
    assert torch.allclose(scales.c_skip, 0.0625 / total)
    assert torch.allclose(scales.c_out, sigma * 0.25 / total.sqrt(), rtol=1e-4)
    assert torch.allclose(scales.c_in, total.rsqrt())
    assert torch.allclose(scales.c_noise, sigma.log() / 4, atol=1e-4)


def test_preconditioning_gives_unit_variance_with_a_shift() -> None:
    n = 400_000
    clean, shift, noise = (torch.randn(n, generator=gen(k)) for k in range(3))
    s, sigma = torch.tensor([0.7]), torch.tensor([0.05])
    x = 0.25 * clean + 0.7 * SHIFT_DATA * shift + 0.05 * noise
    scales = preconditioning(s, sigma)
    assert float((scales.c_in * x).var()) == pytest.approx(1, rel=0.01)
    assert float(((0.25 * clean - scales.c_skip * x) / scales.c_out).var()) == pytest.approx(1, rel=0.01)


def test_preconditioning_leaves_noise_free_images_alone() -> None:
    scales = preconditioning(torch.tensor([0.0, 1.0]), torch.zeros(2))
    assert scales.c_skip.tolist() == [1.0, 1.0]
    assert float(scales.c_out[0]) < 2e-6
    assert float(scales.c_out[1]) == pytest.approx(8 / 255, rel=1e-3)


@pytest.mark.parametrize("bound", [None, 32 / 255])
@pytest.mark.parametrize("s", [0.0, 0.4, 1.0])
def test_untrained_network_is_the_identity_without_noise(bound: float | None, s: float) -> None:
    images = torch.rand(2, 3, 32, 48, generator=gen())
    out = PurifierNet(NetConfig(residual_bound=bound))(images, torch.full((2,), s), torch.zeros(2))
    assert torch.allclose(out, images, atol=1e-6)


def test_untrained_network_shrinks_noise_by_the_wiener_gain() -> None:
    images, sigma = torch.rand(1, 3, 16, 16, generator=gen()), torch.tensor([0.25])
    out = PurifierNet(TINY)(images, torch.zeros(1), sigma)
    assert torch.allclose(out, 0.5 + 0.5 * (images - 0.5), atol=1e-6)


def test_default_config_meets_its_budget() -> None:
    net = PurifierNet()
    assert sum(p.numel() for p in net.parameters()) < 3_000_000
    assert net.multiply_adds(128, 128) < 500_000_000
    assert net.multiple == 16


def test_residual_is_bounded_where_there_is_no_noise() -> None:
    net = random_net(replace(TINY, residual_bound=0.05), scale=3.0)
    images = torch.rand(2, 3, 16, 16, generator=gen())
    change = (net(images, torch.ones(2), torch.zeros(2)) - images).detach().abs()
    assert 0.01 < float(change.max()) <= 0.05 + 1e-6
    noisy = (net(images, torch.ones(2), torch.full((2,), 0.2)) - images).detach().abs()
    assert float(noisy.max()) > 0.05


def test_each_image_has_its_own_time_and_noise() -> None:
    net = random_net()
    images = torch.rand(1, 3, 16, 16, generator=gen()).expand(3, -1, -1, -1)
    s, sigma = torch.tensor([0.0, 1.0, 1.0]), torch.tensor([0.1, 0.1, 0.2])
    out = net(images, s, sigma)
    for k in range(3):
        alone = net(images[:1], s[k : k + 1], sigma[k : k + 1])
        assert torch.allclose(out[k : k + 1], alone, atol=1e-5)
    assert not torch.allclose(out[0], out[1], atol=1e-3)
    assert not torch.allclose(out[1], out[2], atol=1e-3)


def test_prior_training_leaves_the_branch_of_s_untouched() -> None:
    net = random_net()
    loss = prior_loss(net, torch.rand(2, 3, 16, 16, generator=gen()), torch.tensor([0.05, 0.3]))
    loss.sum().backward()
    assert net.embed.time.weight.grad is not None
    assert float(net.embed.time.weight.grad.abs().max()) == 0
    assert net.embed.level.weight.grad is not None
    assert float(net.embed.level.weight.grad.abs().max()) > 0


def test_every_parameter_learns_from_the_bridge_loss() -> None:
    net = random_net()
    clean, attacked = torch.rand(2, 2, 3, 16, 16, generator=gen())
    s = torch.tensor([0.5, 1.0])
    x, level = bridge_state(clean, attacked, s, 0.1, generator=gen())
    charbonnier(net(x, s, level), clean).sum().backward()
    dead = [name for name, p in net.named_parameters() if p.grad is None or float(p.grad.abs().max()) == 0]
    assert dead == []


@pytest.mark.parametrize("s", [0.0, 1.0])
def test_gradients_are_finite_where_nothing_is_left_to_remove(s: float) -> None:
    net = random_net()
    images = torch.rand(1, 3, 16, 16, generator=gen()).requires_grad_()
    level = torch.zeros(1, requires_grad=True)
    net(images, torch.full((1,), s), level).sum().backward()
    assert images.grad is not None
    assert bool(images.grad.isfinite().all())
    assert all(bool(p.grad.isfinite().all()) for p in net.parameters() if p.grad is not None)


def test_wrong_sides_are_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 4"):
        PurifierNet(TINY)(torch.rand(1, 3, 16, 18), torch.ones(1), torch.zeros(1))


def test_multiply_adds_counted_by_hand() -> None:
    config = NetConfig(channels=(4, 6), blocks=(1, 2), embedding=8)
    high, low = 8 * 16, 4 * 8  # positions of a 16x32 image at each resolution
    convolutions = high * (9 * 12 * 4 + 4 * 9 * 4 * 4 + 9 * 4 * 12) + low * (8 * 9 * 6 * 6)
    resampling = low * (4 * 4 * 6) * 2
    linear = 32 * 8 + 8 * 8 + 8 * 8 + 2 * (8 * 8) + 4 * (8 * 12)
    net = PurifierNet(config)
    assert net.multiply_adds(16, 32) == convolutions + resampling + linear
    assert net.multiply_adds(13, 29) == net.multiply_adds(16, 32)


def test_counting_leaves_no_hooks_behind() -> None:
    net = PurifierNet(TINY)
    net.multiply_adds(16, 16)
    assert not any(module._forward_hooks for module in net.modules() if isinstance(module, nn.Module))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 0.0), (torch.float16, 2e-3)])
def test_save_and_load(tmp_path: Path, dtype: torch.dtype, tolerance: float) -> None:
    net = random_net(replace(TINY, residual_bound=0.125))
    save_net(tmp_path / "w", net, kind="bridge", options={"evaluations": 2}, dtype=dtype)
    assert {p.name for p in (tmp_path / "w").iterdir()} == {CONFIG_FILE, WEIGHTS_FILE}
    again, meta = load_net(tmp_path / "w")
    assert again.config == net.config
    assert (meta["kind"], meta["options"]) == ("bridge", {"evaluations": 2})
    assert not again.training
    images = torch.rand(1, 3, 16, 16, generator=gen())
    arguments = (images, torch.ones(1), torch.full((1,), 0.1))
    assert float((net(*arguments) - again(*arguments)).detach().abs().max()) <= tolerance


def test_broken_folders_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(CodefendError, match=r"no config\.json and no model\.safetensors"):
        load_net(tmp_path)
    save_net(tmp_path, PurifierNet(TINY), kind="prior")
    meta = json.loads((tmp_path / CONFIG_FILE).read_text())

    meta["net"]["channels"] = [8, 16]
    (tmp_path / CONFIG_FILE).write_text(json.dumps(meta))
    with pytest.raises(CodefendError, match="not a purifier folder"):
        load_net(tmp_path)

    (tmp_path / CONFIG_FILE).write_text(json.dumps(meta | {"net": {"colour": 1}}))
    with pytest.raises(CodefendError, match="unknown network setting colour"):
        load_net(tmp_path)

    (tmp_path / CONFIG_FILE).write_text("{")
    with pytest.raises(CodefendError, match="not a purifier folder"):
        load_net(tmp_path)
    (tmp_path / CONFIG_FILE).write_text(json.dumps(meta))
    (tmp_path / WEIGHTS_FILE).write_bytes(b"truncated")
    with pytest.raises(CodefendError, match="not a purifier folder"):
        load_net(tmp_path)
