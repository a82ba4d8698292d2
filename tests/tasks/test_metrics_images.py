from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from codefend.tasks.metrics import psnr


def random_images(*shape: int, seed: int = 0) -> Tensor:
    """Smooth random images: noise on a coarse grid, scaled up."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(shape[0], 3, 6, 6, generator=generator)
    return F.interpolate(coarse, shape[1:], mode="bilinear", align_corners=True)


def noisy(images: Tensor, sigma: float) -> Tensor:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(9))
    return (images + sigma * noise).clamp(0, 1)


@pytest.mark.parametrize("shape", [(3, 32, 48), (2, 11, 11), (1, 64, 13)])
@pytest.mark.parametrize("sigma", [0.01, 0.1, 0.5])
def test_psnr_matches_scikit_image(shape: tuple[int, int, int], sigma: float) -> None:
    from skimage import metrics as skimage

    a = random_images(*shape)
    b = noisy(a, sigma)
    for i, (x, y) in enumerate(zip(a.double().numpy(), b.double().numpy(), strict=True)):
        assert psnr(a, b)[i].item() == pytest.approx(skimage.peak_signal_noise_ratio(x, y, data_range=1.0), abs=1e-3)


def test_psnr_of_a_constant_offset() -> None:
    a = torch.full((2, 3, 4, 5), 0.5)
    b = a + torch.tensor([0.1, 0.01]).view(2, 1, 1, 1)
    torch.testing.assert_close(psnr(a, b), torch.tensor([20.0, 40.0]), atol=1e-3, rtol=0)


def test_equal_images_have_infinite_psnr() -> None:
    a = random_images(2, 16, 16)
    assert psnr(a, a).tolist() == [math.inf, math.inf]


def test_the_gradient_points_to_the_clean_image() -> None:
    clean = random_images(2, 16, 16).double()
    images = noisy(clean.float(), 0.1).double().requires_grad_()
    score = psnr(images, clean)
    (gradient,) = torch.autograd.grad(score.sum(), images)
    assert gradient.isfinite().all()
    assert (psnr(images + 1e-3 * gradient / gradient.abs().max(), clean) > score).all()
    assert torch.autograd.gradcheck(lambda x: psnr(x, clean[:1, :1, :11, :11]), images[:1, :1, :11, :11])


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"\(1, 3, 8, 8\) and \(1, 3, 8, 9\)"):
        psnr(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 9))
    with pytest.raises(ValueError, match="two batches"):
        psnr(torch.zeros(3, 8, 8), torch.zeros(3, 8, 8))
