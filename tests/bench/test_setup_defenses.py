"""What is measured of a defense, whatever it declares."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Generator, Tensor

import toys
from codefend.bench.setup import evaluated_defense
from codefend.prompts import PromptPolicy
from codefend.types import WhiteBox


def test_declarations_count_only_where_they_strengthen_the_attack() -> None:
    class Liar(toys.Rounded):
        differentiable = True

    class Modest(toys.Smooth):
        stochastic = False

        def forward(self, images: Tensor, *, generator: Generator | None = None) -> Tensor:
            return images + 0.1 * torch.randn(images.shape, generator=generator)

    image = toys.scene(1)[0][None]
    loaders = replace(toys.loaders(), purifier=lambda name, **options: {"liar": Liar(), "modest": Modest()}[name])
    assert evaluated_defense("liar", loaders, image).gradient == "straight-through"
    assert evaluated_defense("modest", loaders, image).randomized
    bare = evaluated_defense("none", loaders, image)
    assert bare.differentiable is bare.defense


def test_a_straight_through_defense_keeps_its_prompt() -> None:
    image = toys.scene(1)[0][None]
    loaders = replace(toys.loaders(), policy=lambda name: PromptPolicy(name, suffix=" again"))
    evaluated = evaluated_defense("rounded+prompt=twice", loaders, image)
    assert evaluated.gradient == "straight-through"
    assert evaluated.differentiable.prompts(["a"]) == evaluated.defense.prompts(["a"]) == ["a again"]
    assert isinstance(toys.ToyVictim(), WhiteBox)
