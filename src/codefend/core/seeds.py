"""Random generators and seeds, derived from a seed and names, or from the pixels of an image."""

from __future__ import annotations

import hashlib
import hmac
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # `codefend --help` must not import torch
    from torch import Generator, Tensor


def make_generator(seed: int, *names: object, device: str = "cpu") -> Generator:
    """Derive an independent random generator from ``seed`` and names, such as ``(0, "noise", example.id)``."""
    import torch

    digest = hashlib.sha256(json.dumps([seed, *map(str, names)]).encode()).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def noise_like(images: Tensor, generator: Generator | None = None) -> Tensor:
    """Standard normal noise of the images' shape, dtype and device, drawn from ``generator``.

    Drawn on the generator's own device, so that one CPU seed gives the same noise on every device.
    """
    import torch

    source = images.device if generator is None else generator.device
    noise = torch.randn(images.shape, generator=generator, device=source, dtype=images.dtype)
    return noise.to(images.device)


def pixels_digest(secret: bytes, name: str, pixels: Tensor) -> bytes:
    """HMAC-SHA256 under ``secret`` of a purifier's name and of pixels ``[3, H, W]``: 32 bytes that name both.

    So the same pixels get the same noise, in any file, process and order.
    """
    code = hmac.new(secret, f"{name}|{tuple(pixels.shape)}|".encode(), hashlib.sha256)
    code.update(pixels.contiguous().numpy().data)
    return code.digest()


def noise_seed(digest: bytes) -> int:
    """The seed of a generator, from the first 56 bits of a digest."""
    return int.from_bytes(digest[:7], "big")


def secret_of(seed: int) -> bytes:
    """The secret for jobs whose noise is fixed by a public seed. A gateway's secret must be random instead."""
    return f"codefend seed {seed}".encode()
