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
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING

from codefend.core.assets import asset
from codefend.core.specs import lookup
from codefend.types import CodefendError

if TYPE_CHECKING:
    from codefend.encoders.base import Encoder

CLASS_SIDE = 192  # pixels of the view in which EfficientNet-Lite names photographs best, by a try on 28 photographs
SURE = 0.5  # probability above which a class counts


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


@dataclass(frozen=True)
class FamilySpec:
    """A family of small encoders that `codefend train encoder` distils: `encoders.families` builds the networks."""

    name: str
    summary: str
    source: str


def load(name: str) -> Encoder:
    """A new encoder, float32 on the CPU: ``name`` is in `ENCODERS`, or a folder with the weights of a family's encoder.

    Raises CodefendError for an unknown name or missing weights.
    """
    check_name(name)
    return ENCODERS[name].build() if name in ENCODERS else _build("codefend.encoders.families:build", name)


def check_name(name: str) -> None:
    """Raise CodefendError for what is neither in `ENCODERS` nor a folder; loads nothing."""
    if name in ENCODERS or Path(name).is_dir():
        return
    if name in FAMILIES:
        raise CodefendError(
            f"encoder family {name!r} ships without weights: train them with `codefend train encoder --set "
            f"family={name}` and give their folder"
        )
    lookup("encoder", name, ENCODERS)


@cache
def shared(name: str) -> Encoder:
    """The encoder by name, one for the whole process: don't change its weights. Raises CodefendError as `load`."""
    import torch

    with torch.inference_mode(False):  # else gradients could never pass through its weights
        return load(name)


@cache
def class_names() -> tuple[str, ...]:
    """The names of ImageNet-1k's classes, in the order of the logits. Raises CodefendError when not installed."""
    return tuple(asset("data/imagenet_classes.txt").read_text(encoding="utf-8").splitlines())


def _build(place: str, name: str) -> Encoder:
    encoder: Encoder = resolve_name(place)(name)
    return encoder


def _lite(number: int, size: str) -> EncoderSpec:
    return EncoderSpec(
        f"lite{number}",
        f"EfficientNet-Lite{number}, {size} M parameters, ImageNet-1k",
        "Tan & Le 2019, arXiv 1905.11946",
        partial(_build, "codefend.encoders.efficientnet_lite:build", f"lite{number}"),
        local=True,
    )


ENCODERS: dict[str, EncoderSpec] = {spec.name: spec for spec in (_lite(0, "4.7"), _lite(1, "5.4"), _lite(2, "6.1"))}

FAMILIES: dict[str, FamilySpec] = {
    spec.name: spec
    for spec in (
        FamilySpec("vit16", "vision transformer, patches of 16 pixels", "Dosovitskiy et al. 2021, arXiv 2010.11929"),
        FamilySpec("vit8", "vision transformer, patches of 8 pixels", "Dosovitskiy et al. 2021, arXiv 2010.11929"),
        FamilySpec("convnet", "patchify stem and 7x7 depthwise blocks", "Liu et al. 2022, arXiv 2201.03545"),
        FamilySpec("resnet", "max-pooling and residual blocks", "He et al. 2016, arXiv 1512.03385"),
        FamilySpec("vgg", "plain 3x3 convolutions and max-pooling", "Simonyan & Zisserman 2015, arXiv 1409.1556"),
    )
}
