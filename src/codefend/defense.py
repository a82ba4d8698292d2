"""Defenses, and victims behind them. A defended victim is a victim: attacks, tasks and metrics work on it unchanged.

Attack the bare victim and judge the defended one: oblivious (T0). Attack the defended one: adaptive white-box (T2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Generator, Tensor

from codefend.core.devices import default_device
from codefend.core.specs import literal, parse_spec
from codefend.core.votes import elect
from codefend.prompts.policy import WrappedVictim, attach
from codefend.purifiers.base import Purifier, WrappedPurifier
from codefend.types import CodefendError, Victim


@dataclass(frozen=True)
class Defense:
    """A purifier, a prompt policy, or both; ``None`` applies none.

    With ``votes`` above 1 the victim answers that many times, each under noise of its own, and the answer is the one
    that most others are like (`core.votes.elect`). Raises CodefendError for votes behind a purifier without noise.

    >>> import torch
    >>> from codefend import Defense, load_purifier
    >>> defense = Defense(load_purifier("jpeg"), name="jpeg")
    >>> defense.images(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 3, 32, 32])
    >>> defense.prompts(["What is this?"])
    ['What is this?']
    """

    purifier: Purifier | None = None
    policy: Callable[[str], str] | None = None  # of codefend.prompts: text around the query, or a soft prefix
    name: str = "none"
    votes: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.purifier, str):
            raise CodefendError(f"a defense takes a purifier, not its name: load_purifier({self.purifier!r})")
        if self.votes < 1:
            raise CodefendError(f"votes must be 1 or more, not {self.votes}")
        if self.votes > 1 and (self.purifier is None or not self.purifier.stochastic):
            raise CodefendError(f"votes={self.votes} need a purifier that adds noise, or all answers are the same")

    @classmethod
    def from_spec(cls, text: str) -> Defense:
        """Build the defense of a spec of the command line or a saved config, such as ``bridge:sigma=0.1+votes=8``.

        A purifier without a gradient is wrapped in `StraightThrough`. Raises CodefendError for an unknown
        name or option.
        """
        from codefend import prompts, purifiers

        spec = parse_spec(text)
        policy = prompts.load_any(spec.prompt) if spec.prompt else None
        if spec.name == "none":
            return cls(None, policy, votes=spec.votes)
        purifier = purifiers.load(spec.name, **{key: literal(value) for key, value in spec.options.items()})
        differentiable = purifier if purifier.differentiable else StraightThrough(purifier)
        return cls(differentiable, policy, purifier.name, spec.votes)

    def images(self, images: Tensor, *, generator: Generator | None = None) -> Tensor:
        """Purify images ``[B, 3, H, W]`` on the default device; the result is on the device of ``images``."""
        if self.purifier is None:
            return images
        return self.purifier(images.to(default_device()), generator=generator).to(images.device)

    def prompts(self, prompts: Sequence[str]) -> list[str]:
        """The prompts with the policy applied."""
        return list(prompts) if self.policy is None else [self.policy(p) for p in prompts]


class _StraightThroughFn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, purified: Tensor) -> Tensor:
        return purified

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class StraightThrough(WrappedPurifier):
    """Wrap a purifier without a gradient: exact forward, identity backward (BPDA, Athalye et al. 2018, sec. 4.1).

    >>> import torch
    >>> from codefend import StraightThrough, load_purifier
    >>> images = torch.rand(1, 3, 32, 32, requires_grad=True)
    >>> StraightThrough(load_purifier("jpeg"))(images).sum().backward()
    >>> images.grad.unique()
    tensor([1.])
    """

    def __init__(self, purifier: Purifier) -> None:
        super().__init__(purifier)
        self.differentiable, self.surrogate = True, True

    def forward(self, images: Tensor, *, generator: Generator | None = None) -> Tensor:
        with torch.no_grad():
            purified = self.purifier(images, generator=generator)
        return _straight_through(images, purified)

    def transformed(self, images: Tensor, *, generator: Generator | None = None) -> Tensor:
        with torch.no_grad():
            purified = self.purifier.transformed(images, generator=generator)
        return _straight_through(images, purified)


def _straight_through(images: Tensor, purified: Tensor) -> Tensor:
    """``purified``, with the gradient of ``images``."""
    result: Tensor = _StraightThroughFn.apply(images, purified)  # type: ignore[no-untyped-call]
    return result


class DefendedVictim(WrappedVictim):
    """``victim`` behind ``defense``. Each call draws fresh purifier noise unless ``generator`` is given.

    It has the capabilities of the victim, no more and no fewer: a defended white box has ``loss`` and ``features``,
    a defended black box has neither; ask ``isinstance(defended, HasLoss)``. Images are ``[B, 3, H, W]`` in [0, 1].

    Raises CodefendError for a soft prefix that was learned for another victim.

    >>> import torch
    >>> from codefend import DefendedVictim, Defense, load_purifier
    >>> class Brightness:
    ...     name = "brightness"
    ...     def generate(self, images, prompts):
    ...         return ["bright" if image.mean() > 0.5 else "dark" for image in images]
    >>> defended = DefendedVictim(Brightness(), Defense(load_purifier("jpeg"), name="jpeg"))
    >>> defended.name
    'brightness+jpeg'
    >>> defended.generate(torch.zeros(1, 3, 32, 32), ["Bright or dark?"])
    ['dark']
    """

    def __new__(cls, victim: Victim, defense: Defense, *, generator: Generator | None = None) -> Self:
        return super().__new__(cls, attach(victim, defense.policy))  # with the soft prefix of the defense

    def __init__(self, victim: Victim, defense: Defense, *, generator: Generator | None = None) -> None:
        self.defense, self.generator = defense, generator
        self.name = f"{victim.name}+{defense.name}"

    def changed_images(self, images: Tensor) -> Tensor:
        """The purified images."""
        return self.defense.images(images, generator=self.generator)

    def changed_prompts(self, prompts: Sequence[str]) -> Sequence[str]:
        """The prompts with the policy applied."""
        return self.defense.prompts(prompts)

    def generate(self, images: Tensor, prompts: Sequence[str]) -> list[str]:
        with torch.no_grad():
            turns = [super(DefendedVictim, self).generate(images, prompts) for _ in range(self.defense.votes)]
        return turns[0] if len(turns) == 1 else [turn[elect(turn)] for turn in zip(*turns, strict=True)]
