"""The objects of the composed scenes: 64 of them, with names, categories, colours and drawings.

Drawings are Fluent Emoji 3D (MIT) and, for the shift set, Noto Emoji (Apache-2.0), 96 pixels, in
``data/sprites_*.npz``; ``tools/build_sprites.py`` makes those files from the named packages.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from codefend.core.assets import asset

Style = Literal["fluent", "noto"]

# Hue in turns. Names that people do not confuse: "orange" and "pink" are left out for that reason.
COLOURS: dict[str, float] = {"red": 0.0, "yellow": 0.14, "green": 0.36, "blue": 0.60, "purple": 0.78}


@dataclass(frozen=True)
class Thing:
    """A class of object. ``tinted`` ones are drawn in a random colour of COLOURS: so that questions can ask for it."""

    name: str
    code: str  # Unicode code point, hexadecimal: names the drawing in both emoji sets
    category: str
    tinted: bool = False


def _table() -> tuple[Thing, ...]:
    animals = (
        "dog 1f436,rabbit 1f430,fox 1f98a,panda 1f43c,tiger 1f42f,lion 1f981,cow 1f42e,pig 1f437,frog 1f438,"
        "monkey 1f435,penguin 1f427,owl 1f989,bee 1f41d,snail 1f40c,turtle 1f422,crab 1f980,elephant 1f418"
    )
    foods = (
        "banana 1f34c,grapes 1f347,strawberry 1f353,watermelon 1f349,pineapple 1f34d,carrot 1f955,corn 1f33d,"
        "bread 1f35e,pizza 1f355,hamburger 1f354,cake 1f370,donut 1f369"
    )
    others = "mushroom 1f344,tree 1f333,cactus 1f335,sunflower 1f33b,house 1f3e0,camera 1f4f7,clock 1f570,robot 1f916"
    vehicles = "car 1f697,bus 1f68c,bicycle 1f6b2,airplane 2708,boat 26f5"
    clothes = "umbrella 2602,shoe 1f45f,shirt 1f455,dress 1f457,backpack 1f392,crown 1f451,boot 1f462"
    tools = (
        "guitar 1f3b8,book 1f4d5,pencil 270f,scissors 2702,key 1f511,bell 1f514,balloon 1f388,gift 1f381,chair 1fa91,"
        "star 2b50,heart 2764,bucket 1faa3,lock 1f512,mailbox 1f4eb,butterfly 1f98b"
    )
    rows = [(animals, "animal", False), (foods, "food", False), (others, "other", False)]
    rows += [(vehicles, "vehicle", True), (clothes, "clothing", True), (tools, "other", True)]
    things = []
    for text, category, tinted in rows:
        for item in text.split(","):
            name, code = item.split(" ")
            things.append(Thing(name, code, category, tinted))
    # A butterfly is an animal of any colour, so that "tinted" does not imply "no animal".
    return tuple(Thing(t.name, t.code, "animal", True) if t.name == "butterfly" else t for t in things)


THINGS: tuple[Thing, ...] = _table()
BY_NAME: dict[str, int] = {thing.name: index for index, thing in enumerate(THINGS)}
GROUPS = 8  # objects of one group occur together in test scenes only, those of different groups in training scenes


def group(index: int) -> int:
    """The group of an object: consecutive objects (one category) fall into different groups."""
    return index % GROUPS


@cache
def sprites(style: Style) -> Tensor:
    """All drawings of a style, ``[64, 4, 96, 96]`` float32: RGB premultiplied by alpha, then alpha, in [0, 1]."""
    with np.load(asset(f"data/sprites_{style}.npz"), allow_pickle=False) as archive:
        return torch.from_numpy(archive["rgba"]).float().div(255)


def tint(rgba: Tensor, hue: float) -> Tensor:
    """Redraw a premultiplied ``[4, H, W]`` sprite in one hue (turns), keeping its light and shade.

    Value is kept; saturation is raised where the drawing has colour or is mid-grey, so that white highlights and black
    outlines stay.
    """
    alpha = rgba[3:].clamp(min=1e-6)
    rgb = rgba[:3] / alpha
    value = rgb.amax(0)
    saturation = 1 - rgb.amin(0) / value.clamp(min=1e-6)
    value = 0.35 + 0.65 * value  # dark drawings must still show their colour
    saturation = (0.45 + 0.75 * saturation).clamp(max=0.95)
    sector = (torch.tensor([5.0, 3.0, 1.0]).view(3, 1, 1) + hue * 6) % 6  # the usual closed form of HSV -> RGB
    ramp = torch.minimum(sector, 4 - sector).clamp(0, 1)
    coloured = value * (1 - saturation * ramp)
    return torch.cat([coloured.clamp(0, 1) * rgba[3:], rgba[3:]])
