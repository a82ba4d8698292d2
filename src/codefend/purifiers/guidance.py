"""Directional guidance while purifying: small steps away from what the attacked picture looks like to encoders.

What a bridge leaves of a perturbation still pulls features towards those of the attacked picture, also the features of
encoders that the attack was not made for. So the purified picture moves a little against that pull. Related:
anti-adversaries (Alfarra et al. 2022, arXiv 2103.14347) and test-time counterattacks (Xing et al. 2025, arXiv
2503.03613), which move the picture itself away from its own class or embedding, without anything to move away from.

Everything is local (no size is taken over the whole picture), so that a tile is guided as the picture around it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from codefend.core.specs import parse_encoders
from codefend.encoders import efficientnet_lite as encoders
from codefend.purifiers import grid, tiling
from codefend.purifiers.base import pad_to_multiple
from codefend.types import CodefendError

Look = Callable[[Tensor], Tensor]  # [B, 3, H, W] in [0, 1] to features [B, places, width]; sides multiples of MULTIPLE

STEPS = 4
NOISE = 4 / 255  # of each step's own look: a direction that survives it is less the encoder's own
SOFT = 0.3  # where the direction is this weak beside its surroundings, a step is no longer as good as full
NEAR = 15  # pixels a side over which what was taken out is measured
WIDE = 31  # pixels a side over which a gradient is
PERIOD = 256  # pixels after which the noise repeats
MULTIPLE = 32
TINY = 1e-12


class Guidance:
    """Moves purified pictures away from the attacked ones' features.

    ``share`` is how far all steps together may go in a pixel, in units of the root mean square of what purification
    took out around it: a picture that lost little moves little.

    Differentiable in both pictures, exactly where the looks are smooth. An encoder's own gradient jumps at its ReLU6s,
    and so do the steps: rounding alone can move a pixel by a level, and an attacker should also be tried who takes
    guidance for the identity.
    """

    def __init__(self, share: float, looks: Sequence[Look], *, multiply_adds: float = 0.0) -> None:
        self.share, self.looks = share, tuple(looks)
        self.per_pixel = multiply_adds * (1 + 2 * STEPS)  # a step goes there and back

    @classmethod
    def by(cls, share: float, names: str) -> Guidance:
        """By encoders of `encoders.NAMES`, joined by "+". Raises CodefendError for an unknown or uninstalled one."""
        found = names_of(names)
        adds = sum(encoders.multiply_adds_to_middle(name) for name in found)
        return cls(share, [_Middle(name) for name in found], multiply_adds=adds)

    def __call__(self, images: Tensor, purified: Tensor) -> Tensor:
        """``purified`` ``[B, 3, H, W]``, moved; not clipped. ``images`` is what it was purified from."""
        if torch.is_inference_mode_enabled():  # under which nothing has a gradient
            with torch.inference_mode(False), torch.no_grad():
                return self(images.clone(), purified.clone())
        work = [pad_to_multiple(x.float(), MULTIPLE) for x in (images, purified)]
        pixels = work[0][0, 0].numel()
        with torch.autocast(images.device.type, enabled=False):  # gradients of encoders are too fine for 16 bits
            if pixels > grid.TILED_ABOVE:
                pairs = zip(*(x.split(1) for x in work), strict=True)
                moved = torch.cat([self._in_tiles(*pair) for pair in pairs])
            else:
                size = len(images) if _tracked(*work) else max(1, grid.TILED_ABOVE // pixels)
                pairs = zip(*(x.split(size) for x in work), strict=True)
                moved = torch.cat([self._moved(*pair) for pair in pairs])
        return moved[..., : images.shape[-2], : images.shape[-1]].to(purified.dtype)

    def _in_tiles(self, images: Tensor, purified: Tensor) -> Tensor:
        def move(box: grid.Box) -> Tensor:
            top, bottom, left, right = box
            cut = (..., slice(top, bottom), slice(left, right))
            return self._moved(images[cut], purified[cut], top=top, left=left)

        return tiling.blend_boxes(move, purified)

    def _moved(self, images: Tensor, purified: Tensor, *, top: int = 0, left: int = 0) -> Tensor:
        tracked = _tracked(images, purified)
        reach = self.share / STEPS * _size(images - purified, NEAR)
        with torch.set_grad_enabled(tracked):
            wrong = [look(images) for look in self.looks]
        moved = purified
        for noise in _noise(*images.shape[-2:], top=top, left=left).to(images):
            pull = torch.zeros_like(moved)
            for look, away in zip(self.looks, wrong, strict=True):
                with torch.enable_grad():
                    seen = moved + noise if tracked else (moved + noise).detach()
                    seen = seen if seen.requires_grad else seen.requires_grad_()
                    likeness = F.cosine_similarity(look(seen), away, dim=-1).sum()
                    (gradient,) = torch.autograd.grad(likeness, seen, create_graph=tracked)
                pull = pull + gradient / _size(gradient, WIDE)
            moved = moved - reach * torch.tanh(pull / (SOFT * _size(pull, WIDE)))
        return moved

    def multiply_adds(self, height: int, width: int) -> int:
        """For one picture, of looks whose work is known; overlaps of tiles aside."""
        return round(self.per_pixel * height * width)


@dataclass(frozen=True)
class _Middle:
    """The look of an encoder by name: its stage 5. No more than the name goes along when it is pickled."""

    name: str

    def __call__(self, images: Tensor) -> Tensor:
        encoder = encoders.frozen(self.name)
        if encoder.fc.weight.device != images.device:
            encoder.to(images.device)
        return encoder.middle(images).flatten(2).transpose(1, 2)


def names_of(guides: str) -> list[str]:
    """The encoders in ``lite0+lite2``, each once. Raises CodefendError for an unknown one."""
    names = [name for name, _ in parse_encoders(guides)]
    for name in names:
        if name not in encoders.NAMES:
            raise CodefendError(f"unknown encoder {name!r} among the guides; known: {', '.join(encoders.NAMES)}")
    return names


@lru_cache(maxsize=1)
def _pattern() -> Tensor:
    return NOISE * torch.randn(STEPS, 3, PERIOD, PERIOD, generator=torch.Generator().manual_seed(0))


def _noise(height: int, width: int, *, top: int, left: int) -> Tensor:
    """``[STEPS, 3, height, width]``: one pattern, repeated, for all pictures. This is no defense by chance."""
    rows, columns = ((start + torch.arange(side)) % PERIOD for start, side in ((top, height), (left, width)))
    return _pattern()[:, :, rows][..., columns]


def _tracked(*images: Tensor) -> bool:
    """Whether somebody differentiates through them."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in images)


def _size(values: Tensor, side: int) -> Tensor:
    """Root mean square over all channels of the ``side`` x ``side`` pixels around each, ``[B, 1, H, W]``."""
    squares = values.square().mean(1, keepdim=True)
    for window in ((side, 1), (1, side)):  # one after the other: a thirtieth of the work of a square window
        pad = (window[0] // 2, window[1] // 2)
        squares = F.avg_pool2d(squares, window, 1, pad, count_include_pad=False)
    return (squares + TINY**2).sqrt()
