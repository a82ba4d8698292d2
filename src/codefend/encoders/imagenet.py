"""ImageNet-1k class names, and how a classifier of `codefend.encoders` is asked for them."""

from __future__ import annotations

from functools import cache

from codefend.core.assets import asset

CLASS_SIDE = 192  # pixels of the view in which EfficientNet-Lite names photographs best, by a try on 28 photographs
SURE = 0.5  # probability above which a class counts


@cache
def class_names() -> tuple[str, ...]:
    """The names of the 1000 classes, in the order of the logits. Raises CodefendError when they are not installed."""
    return tuple(asset("data/imagenet_classes.txt").read_text(encoding="utf-8").splitlines())
