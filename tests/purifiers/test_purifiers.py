from __future__ import annotations

import io
import struct
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from codefend.contrib import oidn
from codefend.core import assets
from codefend.purifiers import FORMER, PURIFIERS, base, grid, load
from codefend.purifiers.base import Purifier
from codefend.purifiers.bridge import Bridge, BridgeOptions
from codefend.purifiers.diffpure import DiffPure, DiffPureOptions
from codefend.purifiers.nets import NetConfig, PurifierNet, load_net, save_net
from codefend.types import CodefendError

TINY = NetConfig(channels=(6, 8, 8), blocks=(1, 1, 1), embedding=16)
SIZES = [(8, 8), (9, 31), (64, 48), (130, 257)]
QUICK = {
    name: {"steps": 2} for name in ("diffpure", "flowpure", "flowpure-gauss", "adbm", "codefend-r")
}  # options that keep the registry's table fast
# Names with a colon stand for models of other libraries: tests/contrib/backbones/test_backbones.py.
NAMES = [name for name in PURIFIERS if ":" not in name and (name != "oidn" or find_spec("pyoidn"))]


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_net(config: NetConfig = TINY, scale: float = 0.05, seed: int = 0) -> PurifierNet:
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        net, source = PurifierNet(config), gen(seed)
        for parameter in net.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=source))
    return net


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("root") / "weights"
    for kind in ("prior", "bridge", "hgd", "flowpure", "flowpure-gauss", "adbm", "codefend-r"):
        save_net(folder / kind, random_net(), kind=kind)
    for name in ("bridge-detail", "bridge-large"):
        save_net(folder / name, random_net(), kind="bridge")
    return folder


@pytest.fixture(autouse=True)
def _random_weights(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assets, "roots", lambda: (weights.parent, assets.PACKAGE))


# --- the contract, over the registry ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_shape_range_and_determinism(name: str, size: tuple[int, int]) -> None:
    purifier = load(name, **QUICK.get(name, {}))
    images = torch.rand(2, 3, *size, generator=gen())
    original = images.clone()
    out = purifier(images, generator=gen(1))
    assert out.shape == images.shape
    assert out.dtype == images.dtype
    assert 0 <= float(out.min()) <= float(out.max()) <= 1
    assert torch.equal(images, original)
    assert torch.equal(out, purifier(images, generator=gen(1)))
    again = purifier(images, generator=gen(2))
    assert torch.equal(out, again) is not purifier.stochastic


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_dtype_comes_back(name: str, dtype: torch.dtype) -> None:
    purifier = load(name, **QUICK.get(name, {}))
    images = torch.rand(1, 3, 16, 24, generator=gen())
    out = purifier(images.to(dtype), generator=gen())
    assert out.dtype == dtype
    assert float((out.float() - purifier(images, generator=gen())).abs().mean()) < 0.03


@pytest.mark.parametrize("name", NAMES)
def test_gradient_reaches_the_images_unless_declared_otherwise(name: str) -> None:
    purifier = load(name, **QUICK.get(name, {}))
    images = torch.rand(2, 3, 13, 16, generator=gen()).requires_grad_()
    out = purifier(images, generator=gen())
    if not purifier.differentiable:
        assert not out.requires_grad or torch.autograd.grad(out.sum(), images)[0].abs().max() == 0
        return
    (grad,) = torch.autograd.grad((out * torch.rand(out.shape, generator=gen(1))).sum(), images)
    assert bool(grad.isfinite().all())
    assert float(grad[0].abs().max()) > 0
    assert float(grad[1].abs().max()) > 0


@pytest.mark.parametrize("name", NAMES)
def test_pil_round_trip_keeps_size_and_alpha(name: str) -> None:
    purifier = load(name, **QUICK.get(name, {}))
    pixels = np.random.default_rng(0).integers(0, 256, (11, 17, 4), dtype=np.uint8)
    image = Image.fromarray(pixels)
    out = purifier.purify(image, seed=3)
    assert (out.size, out.mode) == ((17, 11), "RGBA")
    assert np.array_equal(np.asarray(out)[..., 3], pixels[..., 3])
    assert np.array_equal(np.asarray(out), np.asarray(purifier.purify(image, seed=3)))


@pytest.mark.parametrize("name", NAMES)
def test_one_pixel_is_padded_not_refused(name: str) -> None:
    out = load(name, **QUICK.get(name, {}))(torch.full((1, 3, 1, 1), 0.5), generator=gen())
    assert out.shape == (1, 3, 1, 1)


@pytest.mark.parametrize(
    "bad", [torch.rand(3, 8, 8), torch.rand(1, 4, 8, 8), torch.zeros(1, 3, 8, 8, dtype=torch.uint8)]
)
def test_wrong_tensors_are_refused(bad: Tensor) -> None:
    with pytest.raises(ValueError, match=r"\[B,3,H,W\]"):
        load("identity")(bad)


def test_registry_is_torch_free_to_import() -> None:
    code = "import sys, codefend.purifiers as p; assert p.PURIFIERS; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_specs_are_filled() -> None:
    assert all(name == spec.name and spec.summary for name, spec in PURIFIERS.items())


# --- loading ---------------------------------------------------------------------------------------------------------


def test_options_in_the_name_and_as_keywords() -> None:
    assert load("jpeg:quality=40").name == "jpeg:quality=40"
    assert load("jpeg").name == load("jpeg:quality=75").name == "jpeg"
    purifier = load("diffpure:t=0.15,steps=15", eta=0.0)
    assert isinstance(purifier, DiffPure)
    assert purifier.options == DiffPureOptions(t=0.15, steps=15, eta=0.0)
    assert purifier.name == "diffpure:t=0.15,steps=15,eta=0"
    assert load("jpeg:quality=40", quality=50).name == "jpeg:quality=50"


@pytest.mark.parametrize(
    ("former", "current"),
    [
        ("bridge-coarse", "bridge:sigma=0.1"),
        ("bridge-coarse:sigma=0.15", "bridge:sigma=0.15"),
        ("bridge-transfer:gate=false", "bridge:sigma=0.02"),
        ("bridge-transfer-large", "bridge-large:sigma=0.02"),
    ],
)
def test_a_former_name_loads_what_replaced_it_and_says_so(
    former: str, current: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert load(former).name == load(current).name == current
    name = former.partition(":")[0]
    assert [record.getMessage() for record in caplog.records] == [
        f"purifier {name} was replaced by {FORMER[name]}, which is loaded"
    ]


def test_diffpure_takes_the_papers_step_count_by_default() -> None:
    assert load("diffpure:t=0.15").evaluations == 150
    assert load("diffpure:t=0.15,steps=15").evaluations == 15


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("brigde", "did you mean 'bridge'"),
        ("jpegg:quality=3", "did you mean 'jpeg'"),
        ("jpeg:qualty=3", "did you mean 'quality'"),
        ("jpeg:80", "expected key=value"),
        ("jpeg:quality=high", "not a whole number"),
        ("jpeg:quality=0", "1 to 100"),
        ("identity:x=1", "no options"),
        ("diffpure:t=0.9", "at most 0.3"),
        ("bridge:evaluations=9", "1 to 4"),
        ("bridge:sigma=-1", "0 to 0.5"),
        ("bridge:strength=0", "above 0, to 1.5"),
        ("bridge:strength=1.6", "above 0, to 1.5"),
        ("flowpure:steps=0", "1 to 1000"),
        ("flowpure:start=0", "above 0"),
        ("flowpure-gauss:noise=2", "0 to 0.6"),
        ("hgd:steps=2", "unknown setting"),
        ("bitdepth:bits=9", "1 to 8"),
        ("median:size=4", "1, 3, 5 or 7"),
        ("blur:sigma=0", "above 0"),
        ("bridge+votes=8", "serve has --prompt and --votes"),
        ("jpeg+prompt=doubt", "belong to a defense"),
        ("./nowhere/at/all", "no such purifier folder"),
    ],
)
def test_mistakes_are_named(name: str, words: str) -> None:
    with pytest.raises(CodefendError, match=words):
        load(name)


def test_missing_weights_name_the_command_that_installs_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assets, "roots", lambda: (tmp_path,))
    with pytest.raises(CodefendError, match=r"^weights/bridge is not installed: pip install 'codefend\[models\]'$"):
        load("bridge")


def test_folder_of_weights_with_saved_defaults(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    save_net(folder, random_net(), kind="bridge", options={"evaluations": 2, "sigma": 0.1})
    purifier = load(folder)
    assert isinstance(purifier, Bridge)
    assert (purifier.name, purifier.evaluations, purifier.stochastic) == ("mine", 2, True)
    assert not any(p.requires_grad for p in purifier.net.parameters())
    other = load(f"{folder}:sigma=0")
    assert (other.name, other.evaluations, other.stochastic) == ("mine:sigma=0", 2, False)
    images = torch.rand(1, 3, 16, 16, generator=gen())
    assert torch.equal(purifier(images, generator=gen(4)), load(str(folder))(images, generator=gen(4)))


def test_bad_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CodefendError, match=r"no config\.json"):
        load(tmp_path)
    save_net(tmp_path, random_net(), kind="painter")
    with pytest.raises(CodefendError, match="unknown kind 'painter'"):
        load(tmp_path)
    save_net(tmp_path, random_net(), kind="bridge", options={"speed": 9})
    with pytest.raises(CodefendError, match="unknown setting 'speed'"):
        load(tmp_path)


# --- each one --------------------------------------------------------------------------------------------------------


def test_jpeg_is_pillows() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=60, subsampling=0)
    expected = np.asarray(Image.open(buffer))
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    out = load("jpeg:quality=60")(images)
    assert np.array_equal((out[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8), expected)


def test_bitdepth_leaves_as_many_levels_as_its_bits() -> None:
    images = torch.rand(1, 3, 32, 32, generator=gen())
    out = load("bitdepth:bits=4,median=1")(images)
    assert len(out.unique()) == 16
    assert float((out - images).abs().max()) <= 0.5 / 15 + 1e-6


def test_median_is_scipys() -> None:
    from scipy import ndimage

    images = torch.rand(1, 3, 12, 15, generator=gen())
    expected = ndimage.median_filter(images.numpy(), size=(1, 1, 3, 3), mode="nearest")
    assert np.array_equal(load("median")(images).numpy(), expected)


def test_blur_is_scipys() -> None:
    from scipy import ndimage

    images = torch.rand(1, 3, 20, 15, generator=gen())
    expected = ndimage.gaussian_filter(images.numpy(), (0, 0, 1.5, 1.5), mode="nearest")
    assert np.allclose(load("blur:sigma=1.5")(images).numpy(), expected, atol=1e-5)


def test_one_evaluation_of_the_bridge_is_the_network() -> None:
    net = random_net()
    images = torch.rand(2, 3, 16, 24, generator=gen())
    assert torch.equal(Bridge(net)(images), net(images, torch.ones(2), torch.zeros(2)).clamp(0, 1))


def test_strength_scales_the_change() -> None:
    net, images = random_net(), 0.3 + 0.4 * torch.rand(2, 3, 16, 24, generator=gen())
    whole, half, more = (Bridge(net, BridgeOptions(strength=s))(images).detach() - images for s in (1.0, 0.5, 1.2))
    assert float(whole.abs().max()) > 0.01
    assert torch.allclose(half, 0.5 * whole, atol=1e-6)
    assert torch.allclose(more, 1.2 * whole, atol=1e-6)


def test_untrained_bridge_is_the_identity_at_any_size() -> None:
    images = torch.rand(1, 3, 37, 50, generator=gen())
    for evaluations in (1, 4):
        purifier = Bridge(PurifierNet(TINY), BridgeOptions(evaluations=evaluations))
        assert torch.allclose(purifier(images), images, atol=1e-6)
        assert float(purifier.score(images).detach()) < 1e-6


def test_score_is_the_magnitude_of_the_removed_part() -> None:
    images = torch.full((2, 3, 8, 8), 0.5)

    class Shift(Purifier):
        name = "shift"

        def transform(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
            return images + torch.tensor([0.1, -0.2]).view(2, 1, 1, 1)

    assert torch.allclose(Shift().score(images), torch.tensor([0.1, 0.2]), atol=1e-6)


def directional(purifier: Purifier, images: Tensor) -> tuple[float, float]:
    """The derivative along a random direction, by autograd and by central differences, noise held fixed."""
    weight = torch.randn(images.shape, generator=gen(1), dtype=images.dtype)
    direction = torch.randn(images.shape, generator=gen(2), dtype=images.dtype)

    def value(x: Tensor) -> Tensor:
        out = purifier(x, generator=gen(3))
        assert 0 < float(out.detach().min()) < float(out.detach().max()) < 1  # clipping would spoil the comparison
        return (weight * out).sum()

    x = images.clone().requires_grad_()
    (grad,) = torch.autograd.grad(value(x), x)
    step = 1e-5
    numeric = (value(images + step * direction) - value(images - step * direction)) / (2 * step)
    return float((grad * direction).sum()), float(numeric.detach())


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("kind", ["bridge", "diffpure"])
def test_gradient_is_exact_through_every_evaluation(kind: str, checkpoint: bool) -> None:
    net = random_net().double()
    purifier: Purifier = (
        Bridge(net, BridgeOptions(evaluations=3, sigma=0.05, checkpoint=checkpoint))
        if kind == "bridge"
        else DiffPure(net, DiffPureOptions(t=0.03, steps=4, checkpoint=checkpoint))
    )
    images = 0.4 + 0.2 * torch.rand(1, 3, 8, 13, generator=gen(), dtype=torch.float64)
    exact, numeric = directional(purifier, images)
    assert abs(exact) > 1e-3
    assert exact == pytest.approx(numeric, rel=1e-5)


def test_clipping_does_not_hide_the_gradient() -> None:
    images = torch.tensor([[-0.2, 0.5, 1.3]], requires_grad=True)
    out = base.clip(images)
    out.sum().backward()
    assert out.tolist() == [[0.0, 0.5, 1.0]]
    assert images.grad is not None
    assert images.grad.tolist() == [[1.0, 1.0, 1.0]]


def test_tza_archive_is_read_as_written() -> None:
    weight = np.arange(8, dtype="<f2").reshape(2, 1, 2, 2)
    bias = np.array([0.5, -2], dtype="<f2")
    data, table = b"", struct.pack("<I", 2)
    for name, array, layout in ((b"a.weight", weight, b"oihw"), (b"a.bias", bias, b"x")):
        table += struct.pack("<H", len(name)) + name + struct.pack("<B", array.ndim)
        table += struct.pack(f"<{array.ndim}I", *array.shape) + layout + b"h" + struct.pack("<Q", 12 + len(data))
        data += array.tobytes()
    tensors = oidn.parse_tza(oidn.MAGIC + struct.pack("<Q", 12 + len(data)) + data + table)
    assert set(tensors) == {"a.weight", "a.bias"}
    assert np.array_equal(tensors["a.weight"].numpy(), weight.astype(np.float32))
    assert np.array_equal(tensors["a.bias"].numpy(), bias.astype(np.float32))


def test_oidn_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oidn, "find_spec", lambda name: None)
    with pytest.raises(CodefendError, match="pip install --no-deps pyoidn"):
        load("oidn")


@pytest.mark.skipif(find_spec("pyoidn") is None, reason="the oidn extra is not installed")
def test_oidn_denoises() -> None:
    y, x = torch.meshgrid(torch.linspace(0, 6, 96), torch.linspace(0, 6, 80), indexing="ij")
    clean = (0.5 + 0.3 * torch.sin(x + y) + 0.2 * (x > 3)).clamp(0, 1).expand(1, 3, -1, -1)
    purifier = load("oidn:sigma=0")
    noisy = (clean + 16 / 255 * torch.randn(clean.shape, generator=gen())).clamp(0, 1)
    assert float((purifier(noisy) - clean).square().mean()) < 0.1 * float((noisy - clean).square().mean())
    assert float((purifier(clean) - clean).square().mean()) < 1e-4
    assert purifier.multiply_adds(16, 32) == purifier.multiply_adds(9, 20) > 1e6


def test_padding_mirrors_and_repeats_where_it_cannot() -> None:
    images = torch.arange(5.0).view(1, 1, 1, 5).expand(1, 3, 1, 5)
    padded = base.pad_to_multiple(images, 8)
    assert padded.shape == (1, 3, 8, 8)
    assert padded[0, 0, 7].tolist() == [0, 1, 2, 3, 4, 3, 2, 1]


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in {"TILED_ABOVE": 90 * 90, "TILE": 96, "OVERLAP": 48, "MARGIN": 16}.items():
        monkeypatch.setattr(grid, key, value)


@pytest.mark.parametrize("size", [(200, 230), (100, 97), (40, 301), (96, 96)])
@pytest.mark.parametrize("name", ["blur", "median", "one level net"])
def test_tiles_equal_the_whole_for_a_local_filter(
    name: str, size: tuple[int, int], small_tiles: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = NetConfig(channels=(6,), blocks=(1,), embedding=16)  # sees 12 pixels around: inside the margin
    purifier = Bridge(random_net(local)) if name == "one level net" else load(name)
    images = torch.rand(2, 3, *size, generator=gen())
    tiled = purifier(images)
    monkeypatch.setattr(grid, "TILED_ABOVE", 10**9)
    assert torch.allclose(tiled, purifier(images), atol=1e-5)


def test_tiles_keep_memory_flat_and_are_counted(small_tiles: None) -> None:
    sizes: list[tuple[int, ...]] = []

    class Spy(Purifier):
        name = "spy"

        def transform(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
            sizes.append(tuple(images.shape))
            return images

        def cost(self, height: int, width: int) -> int:
            return height * width

    images = torch.rand(2, 3, 100, 200, generator=gen())
    assert torch.allclose(Spy()(images), images, atol=1e-6)
    assert max(n * h * w for n, _, h, w in sizes) <= 96 * 96
    assert 2 * Spy().multiply_adds(100, 200) == sum(n * h * w for n, _, h, w in sizes)
    sizes.clear()
    Spy()(torch.rand(9, 3, 40, 50, generator=gen()))  # many small images are split as well
    assert [shape[0] for shape in sizes] == [4, 4, 1]


def test_multiply_adds_scale_with_evaluations_and_shipped_nets(weights: Path) -> None:
    net, _ = load_net(weights / "bridge")
    one = Bridge(net).multiply_adds(50, 60)
    assert one == net.multiply_adds(50, 60) > 0
    assert Bridge(net, BridgeOptions(evaluations=4)).multiply_adds(50, 60) == 4 * one
    assert DiffPure(net, DiffPureOptions(t=0.15)).multiply_adds(50, 60) == 150 * one
    assert load("jpeg").multiply_adds(50, 60) == 0
