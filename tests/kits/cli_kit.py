"""A command line in this process, and toys that replace whole modules."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

import codefend
from codefend.types import CodefendError
from purifiers_kit import PlainPurifier

Run = Callable[..., tuple[int, str, str]]


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **attributes: Any) -> None:
    """Replace the module ``codefend.<name>`` for this test, whether or not it could be imported."""
    module = ModuleType(f"codefend.{name}")
    module.__path__ = [str(Path(codefend.__file__).parent.joinpath(*name.split(".")))]  # real submodules
    vars(module).update(attributes)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    parent, _, leaf = module.__name__.rpartition(".")
    monkeypatch.setattr(import_module(parent), leaf, module, raising=False)


class Brighten(PlainPurifier):
    """A purifier whose effect is easy to see: half way to white."""

    name, differentiable = "brighten", True

    def forward(self, batch: Tensor, *, generator: Generator | None = None) -> Tensor:
        return (batch + 1) / 2


class Toy:
    """A white-box victim that tells dark images from bright ones."""

    name = "toy"

    def generate(self, batch: Tensor, prompts: Sequence[str]) -> list[str]:
        return [
            f"{prompt} {'bright' if float(pixels.mean()) > 0.5 else 'dark'}"
            for pixels, prompt in zip(batch, prompts, strict=True)
        ]

    def loss(self, batch: Tensor, prompts: Sequence[str], targets: Sequence[str]) -> Tensor:
        brightness = batch.flatten(1).mean(1)
        signs = torch.tensor([-1.0 if target.endswith("bright") else 1.0 for target in targets])
        return signs * brightness

    def features(self, batch: Tensor) -> Tensor:
        return batch.flatten(2).transpose(1, 2)


class BlackBox:
    name = "black"

    def generate(self, batch: Tensor, prompts: Sequence[str]) -> list[str]:
        return ["something"] * len(prompts)


class Steps(PlainPurifier):
    """A purifier that declares that it has no gradient."""

    name, differentiable = "steps", False

    def forward(self, batch: Tensor, *, generator: Generator | None = None) -> Tensor:
        return (batch.detach() * 500).round() / 500


def load_purifier(name: str, **options: Any) -> Brighten | Steps:
    if name == "steps":
        return Steps()
    if name != "brighten":
        raise CodefendError(f"unknown purifier {name!r}; did you mean 'brighten'?")
    return Brighten()


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any) -> Any:
        raise error

    return fail
