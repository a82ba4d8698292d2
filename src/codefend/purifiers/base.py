"""What every purifier shares: any picture size, padding, tiles for large pictures, dtypes, and the PIL door."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from codefend.core.devices import mixed_precision
from codefend.core.settings import check_keys, override
from codefend.core.specs import format_spec
from codefend.purifiers import grid, tiling
from codefend.types import CodefendError

if TYPE_CHECKING:
    from PIL.Image import Image

    from codefend.purifiers.detection import Detector
    from codefend.purifiers.guidance import Guidance
    from codefend.purifiers.nets import PurifierNet

Options = TypeVar("Options")


class Purifier(nn.Module):
    """Maps images ``[B,3,H,W]`` in [0, 1] to purified images of the same shape, range, dtype and device.

    A subclass writes `transform`, which receives float images whose sides are multiples of ``multiple``. It is
    differentiable in the images unless ``differentiable`` is False, and never switches gradients off itself. What
    callers need to know is declared in the attributes below; a subclass sets those that differ.
    """

    name: str = "purifier"
    stochastic: bool = False  # adds noise, drawn from ``generator`` when given
    differentiable: bool = True
    surrogate: bool = False  # its gradient is not its own, see `codefend.defense.StraightThrough`
    evaluations: int = 0  # network evaluations per image
    multiple: int = 1  # pixels
    tiled: bool = True  # False when `transform` is not local, so that tiles would change the result
    detector: Detector | None = None  # calibrated for these weights with these options
    gate: bool = False  # return images unchanged that the detector finds clean; needs a detector
    guidance: Guidance | None = None  # moves purified images away from the features of the attacked ones

    def __init__(self, options: Any = None, *, name: str | None = None, defaults: Any = None) -> None:
        """``options`` is a frozen dataclass; the name spells those that differ from ``defaults`` (the class's own)."""
        super().__init__()
        self.options, self.defaults = options, type(options)() if defaults is None else defaults
        self.base_name = name or self.name
        self.name = self.base_name if options is None else format_spec(self.base_name, options, self.defaults)

    if TYPE_CHECKING:  # what `nn.Module.__call__` passes on to `forward`

        def __call__(self, images: Tensor, *, generator: Generator | None = None) -> Tensor: ...

    def transform(self, images: Tensor, generator: Generator | None) -> Tensor:
        """Purify ``[B,3,H,W]`` whose sides are multiples of ``multiple``; the result is clipped to [0, 1] afterwards."""
        raise NotImplementedError

    def replace(self, **options: Any) -> Purifier:
        """The same purifier with other options, as in ``purifier.replace(evaluations=1)``; networks are shared.

        Raises CodefendError for an unknown option or a value that doesn't fit.
        """
        if self.options is None:
            raise CodefendError(f"purifier {self.name} has no options")
        return type(self)(configure(self.options, options))

    def cost(self, height: int, width: int) -> int:
        """Multiply-adds of `transform` for one image of this size; 0 without a network, else counted by running it."""
        weight = next(self.parameters(), None)
        if weight is None:
            return 0
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            self.transform(torch.zeros(1, 3, height, width, device=weight.device), None)
        return int(counter.get_total_flops() // 2)

    def forward(self, images: Tensor, *, generator: Generator | None = None) -> Tensor:
        """Purify ``[B,3,H,W]``. Raises ValueError on another shape, on integers, or for a gate without detector."""
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point() or images.numel() == 0:
            raise ValueError(f"expected float images [B,3,H,W], got {images.dtype} {tuple(images.shape)}")
        purified = self.transformed(images, generator=generator)
        if not self.gate:
            return purified if self.guidance is None else clip(self.guidance(images, purified))
        if self.detector is None:
            raise ValueError(f"{self.name} has a gate but no detector to control it")
        share = self.detector.suspicion(images, purified).to(images.dtype)
        if self.guidance is not None and (open_ := share > 0).any():  # the others stay unchanged
            purified = purified.clone()
            purified[open_] = clip(self.guidance(images[open_], purified[open_]))
        return torch.lerp(images, purified, share.view(-1, 1, 1, 1))

    def transformed(self, images: Tensor, *, generator: Generator | None = None) -> Tensor:
        """As a call, but without what comes after `transform`, guidance and gate: what detectors go by."""
        height, width = images.shape[-2:]
        work = images.float() if images.dtype in (torch.float16, torch.bfloat16) else images
        work = pad_to_multiple(work, self.multiple)
        if self.tiled and height * width > grid.TILED_ABOVE:
            whole = torch.split(work, 1)
            purified = torch.cat([tiling.blend(lambda x: self.transform(x, generator), image) for image in whole])
        else:
            size = images.shape[0] if work.requires_grad else max(1, grid.TILED_ABOVE // (height * width))
            purified = torch.cat([self.transform(part, generator) for part in torch.split(work, size)])
        return clip(purified[..., :height, :width].to(images.dtype))

    def score(self, images: Tensor, *, generator: Generator | None = None) -> Tensor:
        """Detection score per image ``[B]``, see `judge`; costs one purification."""
        return self._judge(images, self.transformed(images, generator=generator))

    def judge(self, images: Tensor, purified: Tensor) -> Tensor:
        """Detection score ``[B]`` of images whose purified form is at hand.

        That costs another evaluation only where a gate or guidance has changed what the network made.

        High is suspicious: the calibrated probability of an attack where the weights have a ``detector``; without one
        the root mean square of what was removed, in [0, 1] pixels (FlowPure's ||v||^2, arXiv 2505.13280, at s = 1).
        """
        return self._judge(images, self.transformed(images) if self.gate or self.guidance else purified)

    def _judge(self, images: Tensor, purified: Tensor) -> Tensor:
        if self.detector is not None:
            return self.detector(images, purified)
        return (images - purified).square().flatten(1).mean(1).sqrt()

    def purify(self, image: Image, *, seed: int = 0, max_side: int | None = None) -> Image:
        """Purify one PIL image of any mode; it comes back in its size and alpha, or shrunk to ``max_side`` pixels.

        Raises CodefendError as images do.
        """
        from codefend.core import images as pictures

        loaded = pictures.from_pil(image)
        alpha = None if loaded.alpha is None else tiling.limit_side(loaded.alpha, max_side)
        loaded = replace(loaded, pixels=tiling.limit_side(loaded.pixels, max_side), alpha=alpha)
        with torch.no_grad():
            purified = self(loaded.pixels[None], generator=torch.Generator().manual_seed(seed))
        return pictures.to_pil(loaded.recombine(purified[0]))

    def multiply_adds(self, height: int, width: int) -> int:
        """Multiply-adds for one picture of ``height`` x ``width``: padding, tiles and all evaluations included."""
        height, width = (-(-side // self.multiple) * self.multiple for side in (height, width))
        boxes = [(0, height, 0, width)]
        if self.tiled and height * width > grid.TILED_ABOVE:
            boxes = list(grid.boxes(height, width))
        guided = 0 if self.guidance is None else self.guidance.multiply_adds(height, width)
        return guided + sum(self.cost(bottom - top, right - left) for top, bottom, left, right in boxes)

    def extra_repr(self) -> str:
        return self.name


class WrappedPurifier(Purifier):
    """Another purifier with something added to its calls; it declares what that one declares."""

    def __init__(self, purifier: Purifier) -> None:
        super().__init__()
        self.purifier = purifier
        self.name, self.evaluations = purifier.name, purifier.evaluations
        self.stochastic, self.differentiable = purifier.stochastic, purifier.differentiable
        self.surrogate, self.multiple, self.tiled = purifier.surrogate, purifier.multiple, purifier.tiled
        self.detector, self.gate, self.guidance = purifier.detector, purifier.gate, purifier.guidance

    def forward(self, images: Tensor, *, generator: Generator | None = None) -> Tensor:
        return self.purifier(images, generator=generator)

    def transformed(self, images: Tensor, *, generator: Generator | None = None) -> Tensor:
        return self.purifier.transformed(images, generator=generator)

    def judge(self, images: Tensor, purified: Tensor) -> Tensor:
        return self.purifier.judge(images, purified)

    def cost(self, height: int, width: int) -> int:
        return self.purifier.cost(height, width)


class NetPurifier(Purifier):
    """A purifier around a network, which follows the images to their device.

    It purifies in mixed precision where the processor is quicker at that (see `devices`): on photographs a pixel
    differs by half a level of 255 without noise, with it by about one, at most. While gradients are wanted it
    computes in the network's own dtype.
    """

    evaluations_option: str = "evaluations"  # the field of ``options`` that sets the number of evaluations
    after_network: tuple[str, ...] = ()  # options that change nothing about what a detector sees

    def __init__(self, net: PurifierNet, options: Any, *, name: str | None = None, defaults: Any = None) -> None:
        super().__init__(options, name=name, defaults=defaults)
        self.net = net
        self.multiple = net.multiple

    def transform(self, images: Tensor, generator: Generator | None) -> Tensor:
        weight = next(self.net.parameters())
        if weight.device != images.device:
            self.net.to(images.device)
        attacked = images.requires_grad and torch.is_grad_enabled()  # then in float32, as exact as its gradient
        with nullcontext() if attacked else mixed_precision(images.device):
            return self.denoise(images.to(weight.dtype), generator)

    def denoise(self, images: Tensor, generator: Generator | None) -> Tensor:
        raise NotImplementedError

    def replace(self, **options: Any) -> NetPurifier:
        """As `Purifier.replace`; the detector stays where it was calibrated for these options.

        ``evaluations`` stands for whichever option sets their number. Raises CodefendError as `Purifier.replace`, and
        for a gate that is left without a detector.
        """
        settings = {self.evaluations_option if key == "evaluations" else key: value for key, value in options.items()}
        changed = type(self)(self.net, configure(self.options, settings), name=self.base_name, defaults=self.defaults)
        changed.use_detector(self.detector, calibrated_for=self.options)
        return changed

    def use_detector(self, detector: Detector | None, *, calibrated_for: Any) -> None:
        """Take ``detector`` if the network runs with the options it was calibrated for: others change its error rates.

        Raises CodefendError for a gate that is left without one.
        """
        unchanged = {key: getattr(self.options, key) for key in self.after_network}
        if detector is not None and replace(calibrated_for, **unchanged) == self.options:
            self.detector = detector
        elif self.gate:
            raise CodefendError(
                f"{self.name} has no detection score to open its gate by: use the weights' own options, or calibrate "
                "them (`codefend calibrate`)"
            )

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


def configure(defaults: Options, settings: Mapping[str, object]) -> Options:
    """Lay settings over an options dataclass: texts as on the command line, anything else as it is.

    Raises CodefendError for an unknown name or a text that doesn't fit.
    """
    texts = {key: value for key, value in settings.items() if isinstance(value, str)}
    check_keys(defaults, dict.fromkeys(settings, ""))
    typed: Any = override(defaults, texts)
    changed: Options = replace(typed, **{key: value for key, value in settings.items() if key not in texts})
    return changed
