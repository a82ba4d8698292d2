"""Frozen image encoders by name, and views of an image. Importing this module imports neither torch nor any encoder.

>>> from codefend import encoders
>>> sorted(encoders.ENCODERS)[:3]
['lite0', 'lite1', 'lite2']
>>> encoders.load("lite0").features(images).shape  # doctest: +SKIP
torch.Size([2, 49, 768])
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from typing import TYPE_CHECKING

from codefend.core.registry import lookup

if TYPE_CHECKING:
    from codefend.encoders.base import Encoder


@dataclass(frozen=True)
class EncoderSpec:
    """One entry of the registry: ``build`` returns a new frozen encoder, or raises CodefendError naming a package.

    ``local``: its `Encoder.local_features` depend on nearby pixels alone and take any size, so it can guide purifiers.
    """

    name: str
    summary: str
    source: str
    build: Callable[[], Encoder]
    local: bool = False


def load(name: str) -> Encoder:
    """A new encoder, float32 on the CPU. Raises CodefendError for an unknown name or missing weights."""
    return lookup("encoder", name, ENCODERS).build()


@cache
def shared(name: str) -> Encoder:
    """The encoder by name, one for the whole process: don't change its weights. Raises CodefendError as `load`."""
    import torch

    with torch.inference_mode(False):  # else gradients could never pass through its weights
        return load(name)


def _build(module: str, name: str) -> Encoder:
    encoder: Encoder = import_module(module).build(name)
    return encoder


def _lite(number: int, size: str) -> EncoderSpec:
    return EncoderSpec(
        f"lite{number}",
        f"EfficientNet-Lite{number}, {size} M parameters, ImageNet-1k",
        "Tan & Le 2019, arXiv 1905.11946",
        partial(_build, "codefend.encoders.efficientnet_lite", f"lite{number}"),
        local=True,
    )


ENCODERS: dict[str, EncoderSpec] = {spec.name: spec for spec in (_lite(0, "4.7"), _lite(1, "5.4"), _lite(2, "6.1"))}
