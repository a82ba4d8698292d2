"""Directional guidance: small steps of the purified image away from the attacked image's features.

What a bridge leaves of a perturbation still pulls features towards those of the attacked image, also the features of
encoders that the attack didn't use. Guidance moves the purified image a little against that pull. Related:
anti-adversaries (Alfarra et al. 2022, arXiv 2103.14347) and test-time counterattacks (Xing et al. 2025, arXiv
2503.03613), which move the input image itself away from its own class or embedding.

Every quantity is local: none is computed over the whole image, so that tiles are guided like the image they are from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from codefend import encoders
from codefend.core.specs import parse_encoders
from codefend.purifiers import grid, tiling
from codefend.purifiers.base import pad_to_multiple
from codefend.types import CodefendError

Features = Callable[[Tensor], Tensor]  # [B, 3, H, W] in [0, 1], sides multiples of MULTIPLE -> [B, T, D]

STEPS = 4
NOISE = 4 / 255  # added in each step before the gradient: directions that survive it depend less on the encoder
SOFT = 0.3  # a direction this weak, relative to its neighbourhood, gets about a third of a full step
NEAR = 15  # side in pixels of the window over which the removed part is measured
WIDE = 31  # side in pixels of the window over which a gradient is measured
PERIOD = 256  # pixels after which the noise repeats
MULTIPLE = 32
TINY = 1e-12


class Guidance:
    """Moves purified images away from the features of the attacked ones.

    ``share`` is the largest total movement of a pixel, in units of the root mean square of what purification removed
    around it: images of which little was removed move little. ``multiply_adds`` are those of all ``features``, per
    pixel.

    Differentiable in both images wherever the features are smooth. An encoder's own gradient jumps at its ReLU6s, and
    so do the steps: rounding alone can move a pixel by a level. Attack with a surrogate gradient too (``bpda=true``).
    """

    def __init__(self, share: float, features: Sequence[Features], *, multiply_adds: float = 0.0) -> None:
        self.share, self.features = share, tuple(features)
        self.per_pixel = multiply_adds * (1 + 2 * STEPS)  # a forward pass, then a forward and a backward pass a step

    @classmethod
    def by_encoders(cls, share: float, guides: Sequence[str]) -> Guidance:
        """By encoders of these names. Raises CodefendError for uninstalled ones."""
        adds = sum(encoders.shared(name).local_multiply_adds for name in guides)
        return cls(share, [_LocalFeatures(name) for name in guides], multiply_adds=adds)

    def __call__(self, images: Tensor, purified: Tensor) -> Tensor:
        """``purified`` ``[B,3,H,W]``, moved and not clipped; ``images`` are the attacked ones it was computed from."""
        if torch.is_inference_mode_enabled():  # gradients are needed even where the caller disabled them
            with torch.inference_mode(False), torch.no_grad():
                return self(images.clone(), purified.clone())
        work = [pad_to_multiple(x.float(), MULTIPLE) for x in (images, purified)]
        pixels = work[0][0, 0].numel()
        with torch.autocast(images.device.type, enabled=False):  # gradients of encoders are too fine for 16 bits
            if pixels > grid.TILED_ABOVE:
                pairs = zip(*(x.split(1) for x in work), strict=True)
                moved = torch.cat([self._move_tiles(*pair) for pair in pairs])
            else:
                size = len(images) if _needs_gradient(*work) else max(1, grid.TILED_ABOVE // pixels)
                pairs = zip(*(x.split(size) for x in work), strict=True)
                moved = torch.cat([self._move(*pair) for pair in pairs])
        return moved[..., : images.shape[-2], : images.shape[-1]].to(purified.dtype)

    def _move_tiles(self, images: Tensor, purified: Tensor) -> Tensor:
        def move(box: grid.Box) -> Tensor:
            top, bottom, left, right = box
            tile = (..., slice(top, bottom), slice(left, right))
            return self._move(images[tile], purified[tile], top=top, left=left)

        return tiling.blend_boxes(move, purified)

    def _move(self, images: Tensor, purified: Tensor, *, top: int = 0, left: int = 0) -> Tensor:
        differentiable = _needs_gradient(images, purified)
        reach = self.share / STEPS * _local_rms(images - purified, NEAR)
        with torch.set_grad_enabled(differentiable):
            attacked = [features(images) for features in self.features]
        moved = purified
        for noise in _noise(*images.shape[-2:], top=top, left=left).to(images):
            pull = torch.zeros_like(moved)
            for features, reference in zip(self.features, attacked, strict=True):
                with torch.enable_grad():
                    noisy = moved + noise if differentiable else (moved + noise).detach()
                    noisy = noisy if noisy.requires_grad else noisy.requires_grad_()
                    similarity = F.cosine_similarity(features(noisy), reference, dim=-1).sum()
                    (gradient,) = torch.autograd.grad(similarity, noisy, create_graph=differentiable)
                pull = pull + gradient / _local_rms(gradient, WIDE)
            moved = moved - reach * torch.tanh(pull / (SOFT * _local_rms(pull, WIDE)))
        return moved

    def multiply_adds(self, height: int, width: int) -> int:
        """Multiply-adds for one image, without the overlaps of tiles."""
        return round(self.per_pixel * height * width)


@dataclass(frozen=True)
class _LocalFeatures:
    """`Encoder.local_features` of the encoder ``name``; pickles as the name alone."""

    name: str

    def __call__(self, images: Tensor) -> Tensor:
        encoder = encoders.shared(self.name)
        if encoder.device != images.device:
            encoder.to(images.device)
        return encoder.local_features(images)


def encoder_names(guides: str) -> list[str]:
    """The encoders in ``lite0+lite2``, each once. Raises CodefendError for one that is unknown or not local."""
    names = [name for name, _ in parse_encoders(guides)]
    local = [name for name, spec in encoders.ENCODERS.items() if spec.local]
    for name in names:
        if name not in local:
            raise CodefendError(f"unknown encoder {name!r} among the guides; known: {', '.join(local)}")
    return names


@lru_cache(maxsize=1)
def _pattern() -> Tensor:
    return NOISE * torch.randn(STEPS, 3, PERIOD, PERIOD, generator=torch.Generator().manual_seed(0))


def _noise(height: int, width: int, *, top: int, left: int) -> Tensor:
    """``[STEPS, 3, height, width]``: one repeated pattern for all images, so that guidance is deterministic."""
    rows, columns = ((start + torch.arange(side)) % PERIOD for start, side in ((top, height), (left, width)))
    return _pattern()[:, :, rows][..., columns]


def _needs_gradient(*images: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in images)


def _local_rms(values: Tensor, side: int) -> Tensor:
    """Root mean square over all channels of the ``side`` x ``side`` pixels around each, ``[B, 1, H, W]``."""
    squares = values.square().mean(1, keepdim=True)
    for window in ((side, 1), (1, side)):  # separable: a thirtieth of the work of a square window
        pad = (window[0] // 2, window[1] // 2)
        squares = F.avg_pool2d(squares, window, 1, pad, count_include_pad=False)
    return (squares + TINY**2).sqrt()
