"""Image-scaling attacks: a kernel sees another image than viewers do."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from codefend import attacks
from codefend.attacks.scaling import HiddenImage, hide
from codefend.bench.config import AttackChoice, EvalConfig
from codefend.core.images import quantize8
from codefend.core.kernels import SPARSE, Kernel, resize
from codefend.types import CodefendError


class Answerer:
    name = "answerer"

    def generate(self, images: Tensor, prompts: Sequence[str]) -> list[str]:
        return ["anything"] * len(images)


def cover(batch: int = 2, height: int = 96, width: int = 128) -> Tensor:
    """Smooth images, as photographs are."""
    coarse = torch.rand(batch, 3, 6, 8, generator=torch.Generator().manual_seed(0))
    return interpolate(coarse, (height, width), mode="bilinear")


def secret(batch: int = 2) -> Tensor:
    return torch.rand(batch, 3, 20, 24, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kernel", SPARSE)
def test_the_kernel_shows_the_hidden_image(kernel: Kernel) -> None:
    attacked = quantize8(hide(cover(), secret(), kernel))
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    error = (resize(attacked, (20, 24), kernel) - secret()).abs()
    assert error.mean() < 1 / 255
    assert error.max() < 8 / 255  # the box [0, 1] leaves little room around extreme values


@pytest.mark.parametrize("kernel", SPARSE)
def test_viewers_see_the_cover(kernel: Kernel) -> None:
    attacked = hide(cover(), secret(), kernel)
    seen, before = resize(attacked, (20, 24), "area"), resize(cover(), (20, 24), "area")
    assert (seen - before).square().mean() < 0.25 * (seen - secret()).square().mean()


def test_an_attack_on_area_averaging_is_visible() -> None:
    attacked = hide(cover(2, 100, 120), secret(), "area")
    torch.testing.assert_close(resize(attacked, (20, 24), "area"), secret(), atol=1 / 255, rtol=0)


def test_half_the_strength_shows_a_mixture() -> None:
    attacked = hide(cover(), secret(), "nearest", strength=0.5)
    mixture = (secret() + resize(cover(), (20, 24), "nearest")) / 2
    torch.testing.assert_close(resize(attacked, (20, 24), "nearest"), mixture)


@pytest.mark.parametrize("name", [name for name in attacks.ATTACKS if name.startswith("scaling-")])
def test_the_registry_hides_images_without_knowing_the_victim(name: str) -> None:
    attacked = attacks.attack(Answerer(), cover(2, 100, 120), ["?", "?"], attack=name, target_images=secret())
    objective = HiddenImage(secret(), name.removeprefix("scaling-"))  # type: ignore[arg-type]
    assert (objective(attacked) < (2 / 255) ** 2).all()


def test_bad_input_is_one_line() -> None:
    with pytest.raises(CodefendError, match="reads all pixels alike"):
        HiddenImage(secret(), "bicubic-antialias")
    with pytest.raises(CodefendError, match="128x96 pixels cannot be hidden in one of 24x20"):
        hide(secret(), cover(), "nearest")
    with pytest.raises(CodefendError, match="needs --target-image"):
        attacks.attack(Answerer(), cover(), ["?", "?"], attack="scaling-bilinear")
    with pytest.raises(CodefendError, match=r"benchmarks/scaling\.py"):
        AttackChoice.parse("scaling-nearest", EvalConfig())
