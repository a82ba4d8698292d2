"""Noise that is a function of the image: the same pixels get the same noise, in any file, process and order."""

from __future__ import annotations

import hashlib
import hmac

from torch import Tensor


def pixels_digest(secret: bytes, name: str, pixels: Tensor) -> bytes:
    """HMAC-SHA256 under ``secret`` of a purifier's name and of pixels ``[3, H, W]``: 32 bytes that name both."""
    code = hmac.new(secret, f"{name}|{tuple(pixels.shape)}|".encode(), hashlib.sha256)
    code.update(pixels.contiguous().numpy().data)
    return code.digest()


def noise_seed(digest: bytes) -> int:
    """The seed of a generator, from the first 56 bits of a digest."""
    return int.from_bytes(digest[:7], "big")


def secret_of(seed: int) -> bytes:
    """The secret for jobs whose noise is fixed by a public seed. A gateway's secret must be random instead."""
    return f"codefend seed {seed}".encode()
