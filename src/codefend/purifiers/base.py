"""What every purifier shares: any picture size, padding, tiles for large pictures, dtypes, and the PIL door."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from codefend.settings import check_keys, override

if TYPE_CHECKING:
    from PIL.Image import Image

    from codefend.nets import PurifierNet

Options = TypeVar("Options")

TILED_ABOVE = 2_000_000  # pixels of one picture
TILE = 1024  # side of a tile, pixels; a multiple of every network's multiple
OVERLAP = 96  # pixels that neighbouring tiles share
MARGIN = 16  # outermost pixels of a tile, seen as context but not used


class ImagePurifier:
    """Images in, images out: ``[B,3,H,W]`` in [0, 1] to the same shape, range and dtype.

    A subclass writes `transform`, which receives float images whose sides are multiples of ``multiple``. It is
    differentiable in the images unless ``differentiable`` is False, and never switches gradients off itself.
    """

    name: str
    stochastic: bool = False  # draws noise, from ``generator`` when given
    differentiable: bool = True
    evaluations: int = 0  # of a network, per picture
    multiple: int = 1  # pixels
    tiled: bool = True  # False when pixels far apart depend on each other's place

    def transform(self, images: Tensor, generator: Generator | None) -> Tensor:
        raise NotImplementedError

    def cost(self, height: int, width: int) -> int:
        """Multiply-adds of `transform` for one picture of this size; only networks are counted."""
        return 0

    def __call__(self, images: Tensor, *, generator: Generator | None = None) -> Tensor:
        """Purify ``[B,3,H,W]``. Raises ValueError on another shape or on integers."""
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point() or images.numel() == 0:
            raise ValueError(f"expected float images [B,3,H,W], got {images.dtype} {tuple(images.shape)}")
        height, width = images.shape[-2:]
        work = images.float() if images.dtype in (torch.float16, torch.bfloat16) else images
        work = pad_to_multiple(work, self.multiple)
        if self.tiled and height * width > TILED_ABOVE:
            purified = torch.cat([self._tiles(image, generator) for image in torch.split(work, 1)])
        else:
            size = images.shape[0] if work.requires_grad else max(1, TILED_ABOVE // (height * width))
            purified = torch.cat([self.transform(part, generator) for part in torch.split(work, size)])
        return clip(purified[..., :height, :width].to(images.dtype))

    def score(self, images: Tensor, *, generator: Generator | None = None) -> Tensor:
        """Detection score per image ``[B]``: root mean square of what purification removed, in [0, 1] units.

        A picture that needs no repair scores low (the deterministic form of FlowPure's ||v||^2, arXiv 2505.13280).
        """
        return (images - self(images, generator=generator)).square().flatten(1).mean(1).sqrt()

    def purify(self, image: Image, *, seed: int = 0) -> Image:
        """Purify one PIL image of any mode and size; its alpha comes back unchanged. Raises UserError as images do."""
        from codefend import images as pictures

        loaded = pictures.from_pil(image)
        with torch.no_grad():
            purified = self(loaded.pixels[None], generator=torch.Generator().manual_seed(seed))
        return pictures.to_pil(loaded.recombine(purified[0]))

    def multiply_adds(self, height: int, width: int) -> int:
        """Multiply-adds for one picture of ``height`` x ``width``: padding, tiles and all evaluations included."""
        height, width = (-(-side // self.multiple) * self.multiple for side in (height, width))
        if not self.tiled or height * width <= TILED_ABOVE:
            return self.cost(height, width)
        return sum(self.cost(y[1] - y[0], x[1] - x[0]) for y in _spans(height) for x in _spans(width))

    def _tiles(self, image: Tensor, generator: Generator | None) -> Tensor:
        total, weights = torch.zeros_like(image), torch.zeros_like(image[:, :1])
        height, width = image.shape[-2:]
        for top, bottom in _spans(height):
            for left, right in _spans(width):
                ramp = _ramp(top, bottom, height).outer(_ramp(left, right, width)).to(image)
                part = self.transform(image[..., top:bottom, left:right], generator)
                total[..., top:bottom, left:right] += part * ramp
                weights[..., top:bottom, left:right] += ramp
        return total / weights

    def __repr__(self) -> str:
        return f"<purifier {self.name}>"


class NetPurifier(ImagePurifier):
    """A purifier around a network, which follows the images to their device and is used in its own dtype."""

    def __init__(self, net: PurifierNet) -> None:
        self.net = net
        self.multiple = net.multiple

    def transform(self, images: Tensor, generator: Generator | None) -> Tensor:
        weight = next(self.net.parameters())
        if weight.device != images.device:
            self.net.to(images.device)
        return self.denoise(images.to(weight.dtype), generator)

    def denoise(self, images: Tensor, generator: Generator | None) -> Tensor:
        raise NotImplementedError

    def cost(self, height: int, width: int) -> int:
        return self.evaluations * self.net.multiply_adds(height, width)


class _ClipFn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor) -> Tensor:
        return images.clamp(0, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def clip(images: Tensor) -> Tensor:
    """Clamp to [0, 1], with the gradient of the identity.

    The true gradient is zero wherever a network overshoots white or black, by however little: it would blind an
    attack there, and a defence must not profit from that (Athalye et al. 2018, arXiv 1802.00420).
    """
    clipped: Tensor = _ClipFn.apply(images)  # type: ignore[no-untyped-call]
    return clipped


def pad_to_multiple(images: Tensor, multiple: int) -> Tensor:
    """Pad right and bottom to multiples: mirrored, or the last row repeated where there is too little to mirror."""
    for dim in (-1, -2):
        side = images.shape[dim]
        missing = -side % multiple
        if missing:
            pad = (0, missing, 0, 0) if dim == -1 else (0, 0, 0, missing)
            images = F.pad(images, pad, mode="reflect" if missing < side else "replicate")
    return images


def _spans(side: int) -> Iterator[tuple[int, int]]:
    # The last tile ends with the picture, and so starts on the network's grid: both sides are multiples.
    starts = range(0, max(side - OVERLAP, 1), TILE - OVERLAP)
    for start in starts:
        first = min(start, max(side - TILE, 0))
        yield first, min(first + TILE, side)


def _ramp(start: int, stop: int, side: int) -> Tensor:
    place = torch.arange(stop - start, dtype=torch.float32)
    before = torch.full_like(place, OVERLAP) if start == 0 else place - MARGIN
    after = torch.full_like(place, OVERLAP) if stop == side else place.flip(0) - MARGIN
    return torch.minimum(before, after).clamp(0, OVERLAP - 2 * MARGIN)


def configure(defaults: Options, settings: Mapping[str, object]) -> Options:
    """Lay settings over an options dataclass: texts as on the command line, anything else as it is.

    Raises UserError for an unknown name or a text that doesn't fit.
    """
    texts = {key: value for key, value in settings.items() if isinstance(value, str)}
    check_keys(defaults, dict.fromkeys(settings, ""))
    typed: Any = override(defaults, texts)
    changed: Options = replace(typed, **{key: value for key, value in settings.items() if key not in texts})
    return changed


def spelled(name: str, options: object, defaults: object) -> str:
    """``name:key=value,...`` with the options that differ from ``defaults``: how `load` would be asked for it."""
    changed = []
    for key, value in vars(options).items():
        if value != getattr(defaults, key):
            changed.append(f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}")
    return f"{name}:{','.join(changed)}" if changed else name
