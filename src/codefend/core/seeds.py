"""Random generators that are derived from a seed and names."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # `codefend --help` must not import torch
    from torch import Generator


def make_generator(seed: int, *names: object, device: str = "cpu") -> Generator:
    """Derive an independent random generator from ``seed`` and names, such as ``(0, "noise", example.id)``."""
    import torch

    digest = hashlib.sha256(json.dumps([seed, *map(str, names)]).encode()).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)
