"""The base class of purifiers: any image size, tiles for large images, dtypes, detection scores, PIL images."""

from __future__ import annotations

import copy
import hashlib
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from codefend.core.devices import mixed_precision
from codefend.core.settings import override
from codefend.core.specs import format_spec
from codefend.purifiers import grid, tiling
from codefend.types import CodefendError

if TYPE_CHECKING:
    from PIL.Image import Image

    from codefend.purifiers.detection import Detector
    from codefend.purifiers.guidance import Guidance
    from codefend.purifiers.nets import PurifierNet


class Purifier(nn.Module):
    """Maps images ``[B,3,H,W]`` in [0, 1] to purified images of the same shape, range, dtype and device.

    A subclass writes `transform`, which receives float images whose sides are multiples of ``multiple``. It is
    differentiable in the images unless ``differentiable`` is False, and never switches gradients off itself. What
    callers need to know is declared in the attributes below; a subclass sets those that differ.

    >>> import torch
    >>> from codefend import Purifier
    >>> class Invert(Purifier):
    ...     name = "invert"
    ...     def transform(self, images, generator):
    ...         return 1 - images
    >>> Invert()(torch.zeros(1, 3, 20, 30)).mean()
    tensor(1.)
    """

    name: str = "purifier"
    stochastic: bool = False  # adds noise, drawn from ``generator`` when given
    noise: float = 0.0  # standard deviation of the Gaussian noise that a call adds first, pixels in [0, 1]; 0: none
    noise_later: bool = False  # draws noise after that, too
    differentiable: bool = True
    surrogate: bool = False  # its gradient is not its own, see `codefend.defense.StraightThrough`
    evaluations: int = 0  # network evaluations per image
    multiple: int = 1  # pixels
    tiled: bool = True  # False when `transform` is not local, so that tiles would change the result
    detector: Detector | None = None  # calibrated for these weights with these options
    gate: bool = False  # return images unchanged that the detector finds clean; needs a detector
    guidance: Guidance | None = None  # moves purified images away from the features of the attacked ones
    options_class: type[Any] | None = None  # a frozen dataclass whose fields all have defaults
    evaluations_option: str = "evaluations"  # the field of the options that sets ``evaluations``

    def __init__(self, options: Any = None, *, name: str | None = None, defaults: Any = None) -> None:
        """``name`` is followed by the options that differ from ``defaults``, which are the class's own if not given."""
        super().__init__()
        if options is None and self.options_class is not None:
            options = self.options_class()
        self.options, self.defaults = options, type(options)() if defaults is None else defaults
        self.base_name = name or self.name
        self.name = format_spec(self.base_name, options, self.defaults) if options != self.defaults else self.base_name

    if TYPE_CHECKING:  # `nn.Module.__call__` passes its arguments on to `forward`

        def __call__(self, images: Tensor, *, generator: Generator | None = None) -> Tensor: ...

    def transform(self, images: Tensor, generator: Generator | None) -> Tensor:
        """Purify ``[B,3,H,W]`` whose sides are multiples of ``multiple``; the caller clips the result to [0, 1]."""
        raise NotImplementedError

    def replace(self, **options: Any) -> Purifier:
        """A purifier with other options that shares the network, as in ``purifier.replace(evaluations=1)``.

        ``evaluations`` stands for the option that sets their number, whatever its name. Raises CodefendError for an
        unknown option and for a value out of range.

        >>> from codefend.purifiers import load
        >>> load("jpeg").replace(quality=30).name
        'jpeg:quality=30'
        """
        if self.options is None:
            raise CodefendError(f"purifier {self.name} has no options")
        settings = {self.evaluations_option if key == "evaluations" else key: value for key, value in options.items()}
        return self._with_options(override(self.options, settings))

    def _with_options(self, options: Any) -> Purifier:
        return type(self)(options, name=self.base_name, defaults=self.defaults)

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        **options: Any,
    ) -> Self:
        """Load a repository of the Hugging Face Hub or a folder, in eval mode with frozen weights.

        ``options`` override the saved ones. Raises CodefendError when it cannot be loaded or is of another class.
        """
        from codefend.purifiers import load_folder
        from codefend.purifiers.hub import find_folder

        places = {"revision": revision, "cache_dir": cache_dir, "local_files_only": local_files_only, "token": token}
        purifier = load_folder(find_folder(name_or_folder, **places), options, name=str(name_or_folder))
        if not isinstance(purifier, cls):
            raise CodefendError(f"{name_or_folder} holds a {type(purifier).__name__}, not a {cls.__name__}")
        return purifier

    def weights_digest(self) -> str:
        """Names the weights by 16 hex digits of their SHA-256."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()[:16]

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
        share = self.detector.gate_share(images, purified).to(images.dtype)
        if self.guidance is not None and (changed := share > 0).any():
            purified = purified.clone()
            purified[changed] = clip(self.guidance(images[changed], purified[changed]))
        return torch.lerp(images, purified, share.view(-1, 1, 1, 1))

    def transformed(self, images: Tensor, *, generator: Generator | None = None) -> Tensor:
        """As a call, but before guidance and gate: the images that detectors compare, ``[B,3,H,W]``."""
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

    def behind_noise(self) -> Purifier:
        """What this purifier does to images that have its ``noise`` already, for certificates (`codefend.certify`).

        Its gate and its guidance see the noisy images only. Raises CodefendError for a purifier without noise.
        """
        if not self.noise:
            raise CodefendError(f"purifier {self.name} adds no noise to its input; use one that does: bridge:sigma=0.1")
        rest = copy.copy(self)
        rest.noise, rest.stochastic = 0.0, self.noise_later
        return rest

    def score(self, images: Tensor, *, generator: Generator | None = None) -> Tensor:
        """Detection score per image ``[B]``, see `judge`; costs one purification."""
        return self._judge(images, self.transformed(images, generator=generator))

    def judge(self, images: Tensor, purified: Tensor) -> Tensor:
        """Detection score ``[B]`` of images, from what the purifier returned for them; high is suspicious.

        With a ``detector``, the calibrated probability of an attack; else the root mean square of the removed part, in
        [0, 1] pixels (FlowPure's ||v||^2, arXiv 2505.13280, at s = 1). With a gate or guidance, which change the
        purified image after the network, it costs another purification.
        """
        return self._judge(images, self.transformed(images) if self.gate or self.guidance else purified)

    def _judge(self, images: Tensor, purified: Tensor) -> Tensor:
        if self.detector is not None:
            return self.detector(images, purified)
        return (images - purified).square().flatten(1).mean(1).sqrt()

    def purify(self, image: Image, *, seed: int = 0, max_side: int | None = None) -> Image:
        """Purify a PIL image of any mode, keeping its size and alpha channel. ``max_side`` as in `images.load`.

        ``seed`` fixes the noise. Raises CodefendError for an image that cannot be converted to RGB.
        """
        from codefend.core.images import from_pil, to_pil

        loaded = from_pil(image, max_side=max_side or 0)
        with torch.no_grad():
            purified = self(loaded.pixels[None], generator=torch.Generator().manual_seed(seed))
        return to_pil(loaded.recombine(purified[0]))

    def multiply_adds(self, height: int, width: int) -> int:
        """Multiply-adds for one image of ``height`` x ``width``: padding, tiles and all evaluations included."""
        height, width = (-(-side // self.multiple) * self.multiple for side in (height, width))
        boxes = [(0, height, 0, width)]
        if self.tiled and height * width > grid.TILED_ABOVE:
            boxes = list(grid.boxes(height, width))
        guided = 0 if self.guidance is None else self.guidance.multiply_adds(height, width)
        return guided + sum(self.cost(bottom - top, right - left) for top, bottom, left, right in boxes)

    def extra_repr(self) -> str:
        return self.name


class WrappedPurifier(Purifier):
    """Base class of wrappers around the calls of another purifier; they declare what that purifier declares."""

    def __init__(self, purifier: Purifier) -> None:
        super().__init__()
        self.purifier = purifier
        self.name, self.evaluations = purifier.name, purifier.evaluations
        self.stochastic, self.differentiable = purifier.stochastic, purifier.differentiable
        self.noise, self.noise_later = purifier.noise, purifier.noise_later
        self.surrogate, self.multiple, self.tiled = purifier.surrogate, purifier.multiple, purifier.tiled
        self.detector, self.gate, self.guidance = purifier.detector, purifier.gate, purifier.guidance

    def forward(self, images: Tensor, *, generator: Generator | None = None) -> Tensor:
        return self.purifier(images, generator=generator)

    def transformed(self, images: Tensor, *, generator: Generator | None = None) -> Tensor:
        return self.purifier.transformed(images, generator=generator)

    def behind_noise(self) -> Purifier:
        return self.purifier.behind_noise()

    def judge(self, images: Tensor, purified: Tensor) -> Tensor:
        return self.purifier.judge(images, purified)

    def cost(self, height: int, width: int) -> int:
        return self.purifier.cost(height, width)


class NetPurifier(Purifier):
    """A purifier around a network, which moves to the images' device.

    It computes in mixed precision where the processor is faster at that (see `core.devices`): on photographs a pixel
    differs by at most half an 8-bit level without noise, and by about one with it. With gradients it computes in the
    network's own dtype.
    """

    kind: str = ""  # of the weights, one of `purifiers.KINDS`
    options_class: type[Any]
    after_network: tuple[str, ...] = ()  # options that don't change `transformed`, and so keep the detector valid

    def __init__(
        self,
        net: PurifierNet,
        options: Any = None,
        *,
        name: str | None = None,
        defaults: Any = None,
        kind: str | None = None,
        detector: Detector | None = None,
    ) -> None:
        """``detector`` was calibrated with ``defaults``; it is dropped where ``options`` change `transformed`."""
        super().__init__(options, name=name, defaults=defaults)
        self.net, self.multiple, self.kind = net, net.multiple, kind or self.kind
        changes = {key for key, value in vars(self.options).items() if value != vars(self.defaults)[key]}
        self.detector = detector if changes <= set(self.after_network) else None

    def transform(self, images: Tensor, generator: Generator | None) -> Tensor:
        weight = next(self.net.parameters())
        if weight.device != images.device:
            self.net.to(images.device)
        exact = images.requires_grad and torch.is_grad_enabled()  # an attack's images and gradients, in float32
        with nullcontext() if exact else mixed_precision(images.device):
            return self.denoise(images.to(weight.dtype), generator)

    def denoise(self, images: Tensor, generator: Generator | None) -> Tensor:
        """`transform` on the network's device and in its dtype."""
        raise NotImplementedError

    def _with_options(self, options: Any) -> NetPurifier:
        names = {"name": self.base_name, "defaults": self.defaults, "kind": self.kind}
        return type(self)(self.net, options, **names, detector=self.detector).train(self.training)

    def cost(self, height: int, width: int) -> int:
        return self.evaluations * self.net.multiply_adds(height, width)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json, model.safetensors and README.md; `from_pretrained` and `purifiers.load` read them.

        Raises CodefendError for a network of another library, and when the folder cannot be written.
        """
        from codefend.purifiers import hub

        hub.save(self, folder)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload purifier",
        revision: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Upload what `save_pretrained` writes to the Hugging Face Hub; returns the commit's address.

        Raises CodefendError as `save_pretrained` and for a missing package, and the library's own errors.
        """
        from codefend.purifiers import hub

        commit = {"commit_message": commit_message, "revision": revision, "create_pr": create_pr}
        return hub.push(self, repo_id, private=private, token=token, **commit)


class _ClipFn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor) -> Tensor:
        return images.clamp(0, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def clip(images: Tensor) -> Tensor:
    """Clamp to [0, 1], with the gradient of the identity.

    The true gradient is zero wherever a network overshoots white or black, which would hide the gradient from an attack
    (Athalye et al. 2018, arXiv 1802.00420).
    """
    clipped: Tensor = _ClipFn.apply(images)  # type: ignore[no-untyped-call]
    return clipped


def pad_to_multiple(images: Tensor, multiple: int) -> Tensor:
    """Pad ``[B,3,H,W]`` right and bottom to multiples: by reflection, or replication where the image is too small."""
    for dim in (-1, -2):
        side = images.shape[dim]
        missing = -side % multiple
        if missing:
            pad = (0, missing, 0, 0) if dim == -1 else (0, 0, 0, missing)
            images = F.pad(images, pad, mode="reflect" if missing < side else "replicate")
    return images
