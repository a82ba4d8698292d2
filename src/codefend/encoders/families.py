"""Small image encoders of the families in `encoders.FAMILIES`, with weights that `codefend train encoder` writes.

They widen the set of encoders that purifiers are attacked through and guided by: a perturbation is specific to a family
of encoders, and a purifier that has met one family undoes little of another's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from codefend.core.checkpoints import load_weights
from codefend.core.files import write_atomic
from codefend.encoders import FAMILIES
from codefend.encoders.base import Encoder
from codefend.types import CodefendError

STRIDE = 16  # pixels per cell of every encoder's last map
WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"
GRID = 14  # cells per side of a transformer's learned positions, resized to those of the image
SIZES = {  # of each family: default width and depth
    "vit16": (192, 6),
    "vit8": (128, 4),
    "convnet": (256, 2),
    "resnet": (256, 2),
    "vgg": (256, 2),
}


@dataclass(frozen=True)
class FamilyConfig:
    """Family and size of an encoder; 0 is the family's default."""

    family: str = "vit16"
    width: int = 0  # channels of the last map
    depth: int = 0  # blocks: of the whole transformer, or at each resolution of the other families

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise CodefendError(f"unknown encoder family {self.family!r}; known: {', '.join(FAMILIES)}")
        if self.width < 0 or self.width % 64 or self.depth < 0:
            raise CodefendError(
                f"width must be a multiple of 64, and depth 0 or more; got {self.width} and {self.depth}"
            )


class FamilyEncoder(Encoder):
    """An encoder of one of the families. `features` are the cells of its last map, ``[B, H/16 * W/16, width]``."""

    def __init__(self, config: FamilyConfig) -> None:
        super().__init__()
        self.config, self.name = config, config.family
        width, depth = SIZES[config.family]
        self.width, depth = config.width or width, config.depth or depth
        self.body = _build_body(config.family, self.width, depth)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # faster on a CPU

    def maps(self, images: Tensor) -> Tensor:
        """The last map ``[B, width, H/16, W/16]``."""
        x = ((images - 0.5) / 0.25).contiguous(memory_format=torch.channels_last)
        last: Tensor = self.body(x)
        return last

    def features(self, images: Tensor) -> Tensor:
        return self.maps(images).flatten(2).transpose(1, 2)


def save_encoder(folder: str | Path, encoder: FamilyEncoder, *, more: Mapping[str, Any] | None = None) -> None:
    """Write ``config.json`` and ``model.safetensors`` (float16). Raises CodefendError when they cannot be written."""
    state = {name: value.detach().to("cpu", torch.float16).contiguous() for name, value in encoder.state_dict().items()}
    config = {"format": 1, "kind": "encoder", "net": asdict(encoder.config), **(more or {})}
    write_atomic(Path(folder) / WEIGHTS_FILE, save(state))
    write_atomic(Path(folder) / CONFIG_FILE, json.dumps(config, indent=2) + "\n")


def load_encoder(folder: str | Path) -> FamilyEncoder:
    """Read what `save_encoder` wrote: frozen, float32. Raises CodefendError when a file is missing or does not fit."""
    folder = Path(folder)
    try:
        net = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))["net"]
        encoder = FamilyEncoder(FamilyConfig(**{field.name: net[field.name] for field in fields(FamilyConfig)}))
        encoder.load_state_dict(load_weights(folder / WEIGHTS_FILE))
    except CodefendError:
        raise
    except Exception as error:  # JSON, safetensors and torch each raise their own
        raise CodefendError(
            f"{folder} holds no encoder ({str(error).splitlines()[0]}); train one with `codefend train encoder`"
        ) from error
    return encoder.requires_grad_(False).eval()


def build(folder: str) -> FamilyEncoder:
    """The encoder for the registry; see `load_encoder`."""
    return load_encoder(folder)


# --- networks --------------------------------------------------------------------------------------------------------


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of each pixel of ``[B, C, H, W]``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        normalized: Tensor = self.norm(x.permute(0, 2, 3, 1))
        return normalized.permute(0, 3, 1, 2)


class TransformerBlock(nn.Module):
    """Pre-norm self-attention and MLP on tokens ``[B, T, D]``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // 64 if width > 64 else 2
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        updated: Tensor = x + self.mlp(self.norm2(x))
        return updated


class Transformer(nn.Module):
    """Images to a map at `STRIDE`; the tokens of smaller patches are averaged at the end."""

    def __init__(self, patch: int, width: int, depth: int) -> None:
        super().__init__()
        self.patch = patch
        self.embed = nn.Conv2d(3, width, patch, stride=patch)
        self.position = nn.Parameter(0.02 * torch.randn(1, width, GRID, GRID))
        self.blocks = nn.ModuleList(TransformerBlock(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images)
        size = x.shape[-2:]
        x = x + F.interpolate(self.position, size, mode="bilinear", align_corners=False)
        x = x.flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x).transpose(1, 2).unflatten(2, size)
        return F.avg_pool2d(x, STRIDE // self.patch) if self.patch < STRIDE else x


class DepthwiseBlock(nn.Module):
    """ConvNeXt's block: 7x7 depthwise convolution, norm, two pointwise layers."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(nn.Linear(channels, 3 * channels), nn.GELU(), nn.Linear(3 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        change: Tensor = self.mlp(self.norm(self.depthwise(x).permute(0, 2, 3, 1)))
        return x + change.permute(0, 3, 1, 2)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with group norm, which needs no running means, in place of batch norm."""

    def __init__(self, inputs: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, channels, 3, stride, 1)
        self.norm1, self.norm2 = nn.GroupNorm(8, channels), nn.GroupNorm(8, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1)
        self.skip = nn.Conv2d(inputs, channels, 1, stride) if stride > 1 or inputs != channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(self.skip(x) + hidden)


def _build_body(family: str, width: int, depth: int) -> nn.Module:
    """Normalized images to the last map, ``width`` channels at `STRIDE`."""
    match family:
        case "vit16" | "vit8":
            return Transformer(int(family.removeprefix("vit")), width, depth)
        case "convnet":
            return _convnet(width, depth)
        case "resnet":
            return _resnet(width, depth)
        case _:
            return _vgg(width, depth)


def _convnet(width: int, depth: int) -> nn.Sequential:
    widths = (width // 4, width // 2, width)
    layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, stride=4), ChannelNorm(widths[0])]
    for level, channels in enumerate(widths):
        if level:
            layers += [ChannelNorm(widths[level - 1]), nn.Conv2d(widths[level - 1], channels, 2, stride=2)]
        layers += [DepthwiseBlock(channels) for _ in range(depth)]
    return nn.Sequential(*layers, ChannelNorm(width))


def _resnet(width: int, depth: int) -> nn.Sequential:
    widths = (width // 4, width // 2, width)
    layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 7, 2, 3), nn.GroupNorm(8, widths[0]), nn.ReLU()]
    layers += [nn.MaxPool2d(3, 2, 1)]
    inputs = widths[0]
    for level, channels in enumerate(widths):
        for index in range(depth):
            layers.append(ResidualBlock(inputs, channels, 2 if level and not index else 1))
            inputs = channels
    return nn.Sequential(*layers)


def _vgg(width: int, depth: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    inputs = 3
    for channels in (width // 16, width // 8, width // 4, width // 2):
        for _ in range(depth):
            layers += [nn.Conv2d(inputs, channels, 3, 1, 1), nn.GroupNorm(4, channels), nn.ReLU()]
            inputs = channels
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Conv2d(inputs, width, 3, 1, 1), nn.GroupNorm(8, width), nn.ReLU())
