"""The purifier network: one residual U-Net for the unconditional prior and for the bridge fine-tuned from it.

Everything here is in variance-exploding (VE) coordinates on [0, 1] pixels: a noisy image is ``x + sigma * n`` with
``n ~ N(0, I)``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from codefend.core.checkpoints import load_weights
from codefend.core.files import write_atomic
from codefend.types import CodefendError

WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"
DIFFUSERS_FILE = "diffusion_pytorch_model.safetensors"  # weights in the old format of the hub
SIGMA_DATA = 0.25  # standard deviation of clean pixels in [0, 1]; EDM's 0.5 on [-1, 1]
SHIFT_DATA = 8 / 255  # root mean square of an adversarial perturbation, pixels

# (noisy images [B,3,H,W], s [B], sigma [B]) -> prediction of the clean images. `PurifierNet` is one.
Denoiser = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class NetConfig:
    """Shape and scaling of a `PurifierNet`; saved as JSON next to its weights.

    ``channels`` and ``blocks`` have one entry per resolution, the finest (half the image's) first; ``blocks`` counts
    those on the way down and as many on the way up. ``residual_bound`` limits what a noise-free bridge may change in
    a pixel (in [0, 1] units), plus four standard deviations of the noise in the input; None is no limit.
    """

    channels: tuple[int, ...] = (24, 48, 96, 192)
    blocks: tuple[int, ...] = (1, 1, 2, 1)
    embedding: int = 128
    residual_bound: float | None = None
    sigma_data: float = SIGMA_DATA
    shift_data: float = SHIFT_DATA

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> NetConfig:
        """Inverse of ``dataclasses.asdict`` through JSON. Raises CodefendError on an unknown field."""
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise CodefendError(
                f"unknown network setting {', '.join(sorted(unknown))}; was it saved by a newer version?"
            )
        lists: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**lists)


class PixelNorm(nn.Module):
    """LayerNorm over the channels of each pixel: local, so that a tile of an image is treated like the whole image."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        normed = F.layer_norm(x.permute(0, 2, 3, 1), self.norm.normalized_shape, self.norm.weight, self.norm.bias)
        return normed.permute(0, 3, 1, 2)  # both transpositions are free in channels-last memory


def _zero(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


class ConvBlock(nn.Module):
    """Residual block of two 3x3 convolutions with FiLM between them (Perez et al. 2018)."""

    def __init__(self, channels: int, embedding: int) -> None:
        super().__init__()
        self.norm = PixelNorm(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.film = nn.Linear(embedding, 2 * channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        _zero(self.film)
        _zero(self.conv2)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.film(embedding)[:, :, None, None].chunk(2, 1)
        hidden = torch.addcmul(shift, self.conv1(self.norm(x)), 1 + scale)
        change: Tensor = self.conv2(F.silu(hidden))
        return x + change


class Stage(nn.Module):
    """The blocks of one resolution."""

    def __init__(self, channels: int, blocks: int, embedding: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ConvBlock(channels, embedding) for _ in range(blocks))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, embedding)
        return x


class Embedding(nn.Module):
    """(s, c_noise, share of the shift in the corruption) ``[B]`` each -> ``[B, width]``.

    The branch of s has no bias, starts at zero and its features vanish at s = 0. The prior, which only ever sees
    s = 0, therefore leaves it untouched, and a bridge starts as the prior at every s.
    """

    def __init__(self, width: int, frequencies: int = 16) -> None:
        super().__init__()
        self.register_buffer("octaves", 2.0 ** torch.linspace(-1, 3, frequencies), persistent=False)
        self.level = nn.Linear(2 * frequencies, width)
        self.time = nn.Linear(8, width, bias=False)
        self.out = nn.Linear(width, width)
        _zero(self.time)

    def forward(self, s: Tensor, noise: Tensor, share: Tensor) -> Tensor:
        angles = noise[:, None] * self.get_buffer("octaves") * math.pi
        level = self.level(torch.cat([angles.sin(), angles.cos()], 1))
        harmonics = torch.arange(1, 5, device=s.device, dtype=s.dtype) * (math.pi / 2)
        time = self.time(torch.cat([(s[:, None] * harmonics).sin(), (share[:, None] * harmonics).sin()], 1))
        return F.silu(self.out(F.silu(level + time)))


class Scales(NamedTuple):
    """Coefficients, ``[B]`` each, of D(x) = c_skip x + c_out F(c_in x; c_noise), F the raw network (EDM, eq. 7)."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor


def preconditioning(
    s: Tensor, sigma: Tensor, *, sigma_data: float = SIGMA_DATA, shift_data: float = SHIFT_DATA
) -> Scales:
    """EDM preconditioning (Karras et al. 2022, Table 1) of an input with a shift as well as noise. All ``[B]``.

    The input is x = x_c + s d + sigma n, with d the adversarial perturbation (RMS ``shift_data``) and n the noise.
    c_skip is EDM's Wiener gain for the noise alone. The rest follows from EDM's two conditions, unit variance of the
    network's input and of its target:

        c_skip    = sigma_data^2 / (sigma_data^2 + sigma^2)
        c_in^-2   = sigma_data^2 + sigma^2 + (s shift_data)^2
        c_out^2   = sigma^2 c_skip + (c_skip s shift_data)^2
        c_noise   = ln(sigma^2 + (s shift_data)^2) / 8

    At s = 0 it is EDM's. At sigma = 0 c_skip is 1, so that a zero network is the identity. c_noise is EDM's ln(.)/4 of
    the total corruption: a prior given a shift first removes as much noise as the shift is large.
    """
    noise2, data2, shift2 = sigma**2, sigma_data**2, (s * shift_data) ** 2
    c_skip = data2 / (noise2 + data2)
    # The epsilons keep gradients and the logarithm finite at s = sigma = 0.
    c_out = (noise2 * c_skip + c_skip**2 * shift2 + 1e-12).sqrt()
    c_in = (data2 + noise2 + shift2).rsqrt()
    return Scales(c_skip, c_out, c_in, (noise2 + shift2 + 1e-8).log() / 8)


class PurifierNet(nn.Module):
    """Residual U-Net that predicts the clean image: ``(images [B,3,H,W], s [B], sigma [B]) -> [B,3,H,W]``.

    ``s`` in [0, 1] is the share of the adversarial perturbation still in the image and ``sigma`` the standard deviation
    of the Gaussian noise in it ([0, 1] pixels). The unconditional prior is s = 0, a purifier's input s = 1. The raw
    network F is wrapped by `preconditioning`; its last layer starts at zero, so at sigma = 0 the untrained
    network is the identity. Fully convolutional and local; sides must be multiples of ``multiple``. No clamping.
    """

    def __init__(self, config: NetConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or NetConfig()
        widths, wide = config.channels, config.embedding
        self.multiple = 2 ** len(widths)
        self.embed = Embedding(wide)
        self.stem = nn.Conv2d(12, widths[0], 3, padding=1)
        stages = list(zip(widths, config.blocks, strict=True))
        self.down_blocks = nn.ModuleList(Stage(c, n, wide) for c, n in stages)
        self.up_blocks = nn.ModuleList(Stage(c, n, wide) for c, n in stages)
        pairs = list(pairwise(widths))
        self.downs = nn.ModuleList(nn.Conv2d(a, b, 2, stride=2) for a, b in pairs)
        self.ups = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, stride=2) for a, b in pairs)
        self.head = nn.Conv2d(widths[0], 12, 3, padding=1)
        _zero(self.head)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # 3x faster on a CPU

    def forward(self, images: Tensor, s: Tensor, sigma: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        if height % self.multiple or width % self.multiple:
            raise ValueError(f"sides must be multiples of {self.multiple}, got {height}x{width}")
        config = self.config
        scales = preconditioning(s, sigma, sigma_data=config.sigma_data, shift_data=config.shift_data)
        c_skip, c_out, c_in = (scale.view(-1, 1, 1, 1) for scale in scales[:3])
        share = s * config.shift_data / (4 * scales.c_noise).exp()  # of the total corruption
        centred = images - 0.5
        change = c_out * self.raw(c_in * centred, self.embed(s, scales.c_noise, share))
        if config.residual_bound is not None:
            bound = config.residual_bound + 4 * sigma.view(-1, 1, 1, 1)
            change = bound * torch.tanh(change / bound)
        return c_skip * centred + change + 0.5

    def raw(self, x: Tensor, embedding: Tensor) -> Tensor:
        """The bare U-Net F, ``[B,3,H,W]`` -> ``[B,3,H,W]`` of about unit variance."""
        x = self.stem(F.pixel_unshuffle(x, 2).contiguous(memory_format=torch.channels_last))
        skips = []
        for level, stage in enumerate(self.down_blocks):
            x = stage(x if level == 0 else self.downs[level - 1](x), embedding)
            skips.append(x)
        for level in reversed(range(len(skips))):
            x = x if level == len(self.ups) else self.ups[level](x) + skips[level]
            x = self.up_blocks[level](x, embedding)
        return F.pixel_shuffle(self.head(x), 2)

    def multiply_adds(self, height: int, width: int) -> int:
        """Multiply-adds of one evaluation of one image, padded to the network's multiple; from shapes alone."""
        return count_multiply_adds(self.config, _ceil(height, self.multiple), _ceil(width, self.multiple))


def per_image(value: Tensor | float, images: Tensor) -> Tensor:
    """``value`` as a ``[B]`` tensor on the images' device and dtype."""
    return torch.as_tensor(value, dtype=images.dtype, device=images.device).expand(images.shape[0])


def evaluate(net: Denoiser, x: Tensor, s: Tensor, sigma: Tensor, *, checkpoint: bool = False) -> Tensor:
    """One network evaluation, with ``checkpoint`` recomputed in the backward pass. Networks here draw no noise."""
    if checkpoint and torch.is_grad_enabled():
        result: Tensor = recompute(net, x, s, sigma, use_reentrant=False, preserve_rng_state=False)
        return result
    return net(x, s, sigma)


def _ceil(side: int, multiple: int) -> int:
    return -(-side // multiple) * multiple


@lru_cache(maxsize=64)
def count_multiply_adds(config: NetConfig, height: int, width: int) -> int:
    """Multiply-adds of convolutions and linear layers, counted by hooks on a meta-device copy."""
    total = 0

    def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        weight = module.weight
        assert isinstance(weight, Tensor)
        places = inputs[0] if isinstance(module, nn.ConvTranspose2d) else output
        # weight.numel() multiply-adds per spatial position (per row for a linear layer).
        total += weight.numel() * (places[0, 0].numel() if places.dim() == 4 else 1)

    with torch.device("meta"):
        # Moved as well: Transformers replaces torch.linspace while it loads, and a device context that is first used
        # then misses the original.
        net = PurifierNet(config).to("meta")
        for module in net.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                module.register_forward_hook(add)
        net(torch.empty(1, 3, height, width), torch.empty(1), torch.empty(1))
    return total


def save_net(
    folder: str | Path,
    net: PurifierNet,
    *,
    kind: str,
    options: Mapping[str, Any] | None = None,
    detector: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write ``config.json`` and ``model.safetensors`` into ``folder``, each atomically.

    ``kind`` is one of `purifiers.KINDS`; ``options`` are the purifier's defaults (evaluations, sigma, t, steps, ...),
    ``detector`` is a `Detector` as a dictionary. Raises CodefendError when the folder cannot be written.
    """
    state = {name: value.detach().to("cpu", dtype).contiguous() for name, value in net.state_dict().items()}
    meta = {"format": 1, "kind": kind, "net": asdict(net.config), "options": dict(options or {})}
    if detector is not None:
        meta["detector"] = dict(detector)
    write_atomic(Path(folder) / WEIGHTS_FILE, save(state))
    write_atomic(Path(folder) / CONFIG_FILE, json.dumps(meta, indent=2) + "\n")


def load_net(folder: str | Path) -> tuple[PurifierNet, dict[str, Any]]:
    """Read what `save_net` wrote: the network (float32, eval mode) and the whole config.

    Folders in the format of diffusers, which older versions wrote for the hub, load as well. Raises CodefendError when
    a file is missing, unreadable or doesn't fit the other, or when weights are not finite.
    """
    folder = Path(folder)
    weights, prefix = WEIGHTS_FILE, ""
    if not (folder / weights).is_file() and (folder / DIFFUSERS_FILE).is_file():
        weights, prefix = DIFFUSERS_FILE, "network."
    missing = [name for name in (CONFIG_FILE, weights) if not (folder / name).is_file()]
    if missing:
        raise CodefendError(f"{folder} holds no {' and no '.join(missing)}; a purifier folder has both")
    try:
        meta: dict[str, Any] = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        net = PurifierNet(NetConfig.from_dict(meta["net"]))
        state = load_weights(folder / weights)
        net.load_state_dict({name.removeprefix(prefix): value for name, value in state.items()})
    except CodefendError:
        raise
    except Exception as error:  # JSON, safetensors and torch each raise their own
        raise CodefendError(f"{folder} is not a purifier folder: {str(error).splitlines()[0]}") from error
    return net.eval(), meta
