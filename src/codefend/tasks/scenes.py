"""Composed scenes: one to four objects on plain, procedural or photographic backgrounds, from a seed.

A scene is a pure function of ``(split, seed)``. Any two objects of a training scene come from different groups
(`objects.group`) and any two of a test scene from one group, so no pair of objects occurs in both.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from codefend.core.assets import needs
from codefend.tasks.objects import COLOURS, GROUPS, THINGS, Style, Thing, group, sprites, tint

Split = Literal["train", "val", "test", "shift"]
SIZE = 128  # pixels; adversarial training's cost grows with the pixels, four objects need this many
PLACES = ("top left", "top right", "bottom left", "bottom right", "center")
# scikit-image's photographs without copyright (public domain or CC0) that show no object of THINGS.
PHOTOGRAPHS = ("brick", "grass", "gravel", "hubble_deep_field", "moon", "retina", "immunohistochemistry", "coins")


@dataclass(frozen=True)
class PlacedObject:
    """An object in a scene: kind, colour (tinted ones only) and place. Pixels from the top left corner."""

    thing: Thing
    colour: str | None
    place: str
    left: int
    top: int
    size: int

    @property
    def phrase(self) -> str:
        """The object's name with its colour, without article."""
        return f"{self.colour} {self.thing.name}" if self.colour else self.thing.name

    @property
    def column(self) -> int:
        return {"left": 0, "right": 1}.get(self.place.split(" ")[-1], -1)

    @property
    def row(self) -> int:
        return {"top": 0, "bottom": 1}.get(self.place.split(" ")[0], -1)


@dataclass(frozen=True)
class Scene:
    """``objects`` in reading order (top row first, then from the left), ``image`` ``[3, 128, 128]`` in [0, 1]."""

    image: Tensor
    objects: tuple[PlacedObject, ...]


def scene_rng(split: Split, seed: int) -> np.random.Generator:
    """Independent streams for each split and seed."""
    return np.random.default_rng([zlib.crc32(split.encode()), seed])


def compose(split: Split, seed: int, *, photographs: Sequence[Tensor] = ()) -> Scene:
    """Draw the scene ``(split, seed)``. ``shift`` is ``test`` in the second drawing style.

    ``photographs``: float32 ``[3, H, W]`` images, at least 160 pixels a side, for a third of the backgrounds.
    """
    rng = scene_rng(split, seed)
    style: Style = "noto" if split == "shift" else "fluent"
    objects = _arrange(rng, _choose(rng, within_group=split in ("test", "shift")))
    image = _background(rng, photographs)
    for item in objects:
        image = _paste(image, item, style, flip=bool(rng.random() < 0.5))
    return Scene(image.clamp(0, 1), objects)


def _choose(rng: np.random.Generator, *, within_group: bool) -> list[Thing]:
    count = int(rng.choice([1, 2, 3, 4], p=[0.2, 0.35, 0.25, 0.2]))
    if within_group:
        chosen_group = int(rng.integers(GROUPS))
        members = [i for i in range(len(THINGS)) if group(i) == chosen_group]
        picks = rng.choice(members, size=count, replace=False)
    else:
        groups = rng.choice(GROUPS, size=count, replace=False)
        picks = np.array([rng.choice([i for i in range(len(THINGS)) if group(i) == g]) for g in groups])
    return [THINGS[int(i)] for i in picks]


def _arrange(rng: np.random.Generator, things: Sequence[Thing]) -> tuple[PlacedObject, ...]:
    """One object a quadrant, jittered inside it, so that places and relations are unambiguous."""
    if len(things) == 1 and rng.random() < 0.5:
        places = [4]
    else:
        places = sorted(int(p) for p in rng.choice(4, size=len(things), replace=False))
    objects = []
    for thing, place in zip(things, places, strict=True):
        low, high = (60, 100) if place == 4 else (46, 60)
        size = int(rng.integers(low, high))
        room = (SIZE if place == 4 else SIZE // 2) - size
        jitter = np.array([room / 2, room / 2]) if place == 4 else rng.uniform(0.1, 0.9, 2) * room
        origin = np.array([0, 0]) if place == 4 else np.array([place // 2, place % 2]) * (SIZE // 2)
        top, left = (int(v) for v in origin + jitter)
        colour = str(rng.choice(list(COLOURS))) if thing.tinted else None
        objects.append(PlacedObject(thing, colour, PLACES[place], left, top, size))
    return tuple(objects)


def _paste(image: Tensor, item: PlacedObject, style: Style, *, flip: bool) -> Tensor:
    sprite = sprites(style)[THINGS.index(item.thing)]
    if item.colour:
        sprite = tint(sprite, COLOURS[item.colour])
    if flip:
        sprite = sprite.flip(-1)
    shape = (item.size, item.size)
    small = F.interpolate(sprite[None], shape, mode="bilinear", antialias=True, align_corners=False)[0]
    image = image.clone()
    window = image[:, item.top : item.top + item.size, item.left : item.left + item.size]
    window.mul_(1 - small[3:]).add_(small[:3])
    return image


def _background(rng: np.random.Generator, photographs: Sequence[Tensor]) -> Tensor:
    kind = rng.random()
    if photographs and kind < 0.34:
        return _photographic(rng, photographs[int(rng.integers(len(photographs)))])
    first, second = (_muted(rng) for _ in range(2))
    if kind < 0.6:
        return first.expand(3, SIZE, SIZE).clone()
    if kind < 0.8:  # a gradient between two colours in a random direction
        angle = rng.uniform(0, 2 * np.pi)
        y, x = torch.meshgrid(torch.linspace(-1, 1, SIZE), torch.linspace(-1, 1, SIZE), indexing="ij")
        ramp: Tensor = (x * float(np.cos(angle)) + y * float(np.sin(angle))) / 2.83 + 0.5
        return first * ramp + second * (1 - ramp)
    return (first + (second - first) * _cloud(rng)).clamp(0, 1)


def _muted(rng: np.random.Generator) -> Tensor:
    """A background colour of moderate saturation, so that objects of any colour stand out."""
    colour = rng.uniform(0.25, 1.0, 3)
    return torch.tensor(0.6 * colour + 0.4 * colour.mean(), dtype=torch.float32).view(3, 1, 1)


def _cloud(rng: np.random.Generator) -> Tensor:
    """Smooth noise of several octaves in [0, 1], ``[1, 128, 128]``."""
    total = torch.zeros(1, SIZE, SIZE)
    for octave, weight in ((3, 1.0), (6, 0.5), (12, 0.25), (24, 0.12)):
        grid = torch.tensor(rng.random((1, 1, octave, octave)), dtype=torch.float32)
        total += weight * F.interpolate(grid, (SIZE, SIZE), mode="bicubic", align_corners=False)[0]
    return (total / 1.87).clamp(0, 1)


def _photographic(rng: np.random.Generator, photograph: Tensor) -> Tensor:
    side = int(rng.integers(SIZE, min(photograph.shape[1:]) + 1))
    top = int(rng.integers(photograph.shape[1] - side + 1))
    left = int(rng.integers(photograph.shape[2] - side + 1))
    crop = photograph[None, :, top : top + side, left : left + side]
    crop = F.interpolate(crop, (SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False)[0]
    contrast = float(rng.uniform(0.35, 0.8))  # strong textures would also hide objects from people
    return (crop - crop.mean()) * contrast + float(rng.uniform(0.4, 0.65))


@cache
def load_photographs() -> tuple[Tensor, ...]:
    """The backgrounds that scikit-image carries, ``[3, H, W]`` each. Raises CodefendError when it is not installed."""
    with needs("drawing scenes", "train"):
        from skimage import data
    photographs = []
    for name in PHOTOGRAPHS:
        array = np.asarray(getattr(data, name)())
        array = np.repeat(array[..., None], 3, axis=2) if array.ndim == 2 else array[..., :3]
        photographs.append(torch.from_numpy(array.copy()).permute(2, 0, 1).float().div(255))
    return tuple(photographs)
