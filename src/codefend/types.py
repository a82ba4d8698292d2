"""Core types: protocols and dataclasses that every other module uses.

Images are float32 ``[B, 3, H, W]``, RGB, in ``[0, 1]``; every eps is in these units (``8/255``).
``B`` is a batch, ``N`` a number of examples, ``T`` vision tokens, ``D`` their width.
Losses and scores are per example; only code that prints or plots them reduces them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:  # `import codefend` must not import torch
    from torch import Generator, Tensor


class CodefendError(ValueError):
    """Raised for invalid input that the user can correct; the message says how.

    The command line prints it on one line and exits with code 2.

    >>> from codefend import CodefendError, load_purifier
    >>> try:
    ...     load_purifier("jpg")
    ... except CodefendError as error:
    ...     print(str(error).startswith("unknown purifier 'jpg'"))
    True
    """


@dataclass(frozen=True)
class Example:
    """One image with one prompt.

    ``image`` is float32 ``[3, H, W]`` in [0, 1]. ``references`` are correct answers: captions for captioning, the
    annotators' answers for VQA (ten in VQAv2, one here). ``kind`` groups questions ("colour", "count", ...); ``tags``
    are words that a correct caption must contain. ``source`` names what several images come from, such as the
    photograph of which they are crops: intervals resample sources, or images where it is empty.

    >>> import torch
    >>> from codefend import Example
    >>> Example("1", torch.zeros(3, 32, 32), "What colour is it?", references=("black",), kind="colour").references
    ('black',)
    """

    id: str
    image: Tensor  # [3, H, W]
    prompt: str
    references: tuple[str, ...] = ()
    kind: str = ""
    tags: tuple[str, ...] = ()
    source: str = ""


@dataclass(frozen=True)
class Budget:
    """The limits of an attack: a ball of radius ``eps`` (pixels in [0, 1]), gradient steps, samples per gradient.

    >>> from codefend import Budget
    >>> Budget(eps=4 / 255, steps=20).norm
    'linf'
    """

    norm: Literal["linf", "l2"] = "linf"
    eps: float = 8 / 255
    steps: int = 100
    eot: int = 1  # gradient samples averaged per step (Athalye et al. 2018, expectation over transformation)


Objective = Callable[["Tensor"], "Tensor"]  # [B,3,H,W] -> [B]; lower is better for the attacker
Metric = Callable[[Sequence[str], Sequence[Example]], "Tensor"]  # -> [N]; higher is better; nan = not scored


@runtime_checkable
class Victim(Protocol):
    """A multimodal LLM that answers. Further capabilities are protocols: `HasLoss`, `HasFeatures`, ..."""

    name: str

    def generate(self, images: Tensor, prompts: Sequence[str]) -> list[str]:
        """One answer for each image of ``[B, 3, H, W]`` and its prompt."""
        ...


@runtime_checkable
class HasLoss(Protocol):
    """A victim with a language-model loss that is differentiable in the images."""

    def loss(self, images: Tensor, prompts: Sequence[str], targets: Sequence[str]) -> Tensor:
        """Mean negative log-likelihood per target token, ``[B]``."""
        ...


@runtime_checkable
class HasFeatures(Protocol):
    """A victim with vision tokens that are differentiable in the images."""

    def features(self, images: Tensor) -> Tensor:
        """Vision tokens as the language model receives them from the encoder, ``[B, T, D]``."""
        ...


@runtime_checkable
class HasMargins(Protocol):
    """A victim with access to its logits."""

    def margins(self, images: Tensor, prompts: Sequence[str], targets: Sequence[str]) -> list[Tensor]:
        """Logit of each target token minus the largest other logit, ``[L_i]`` for each image."""
        ...


@runtime_checkable
class HasAnswerLogits(Protocol):
    """A victim that returns the logits of every token of an answer."""

    def answer_logits(self, images: Tensor, prompts: Sequence[str], targets: Sequence[str]) -> list[Tensor]:
        """Logits that predict each token of the targets, ``[L_i, V]`` for each image, differentiable in the images."""
        ...


@runtime_checkable
class HasWordScores(Protocol):
    """A victim whose vision tokens and words share a space."""

    vocabulary: Sequence[str]

    def word_scores(self, images: Tensor, words: Sequence[str]) -> Tensor:
        """How well each vision token fits each word, ``[B, T, C]``."""
        ...


@runtime_checkable
class HasClassScores(Protocol):
    """A victim whose vision encoder names classes."""

    @property
    def classes(self) -> Sequence[str]:
        """The names of the classes; none where the encoder has no classes."""
        ...

    def class_scores(self, images: Tensor) -> Tensor:
        """The logit of each class, ``[B, C]``, differentiable in the images."""
        ...


@runtime_checkable
class AnswersGreedily(Protocol):
    """A victim that says whether its answer is a function of image and prompt: greedy decoding, no sampling."""

    greedy: bool


@runtime_checkable
class WhiteBox(Victim, HasLoss, HasFeatures, Protocol):
    """A victim with gradients: loss and features are differentiable in the images."""


class Attack(Protocol):
    """Lowers an objective inside a budget and inside [0, 1]; returns the best images, not the last iterate."""

    name: str

    def __call__(
        self, objective: Objective, images: Tensor, budget: Budget, *, generator: Generator | None = None
    ) -> Tensor: ...


@dataclass(frozen=True)
class Task:
    """Examples and the metrics that judge answers to them. ``headline`` names the metric that tables show first.

    A metric maps N answers and N examples to ``[N]``, higher is better.

    >>> import torch
    >>> from codefend import Example, Task
    >>> def correct(answers, examples):
    ...     return torch.tensor([float(a in e.references) for a, e in zip(answers, examples)])
    >>> black = Example("1", torch.zeros(3, 32, 32), "Bright or dark?", ("dark",))
    >>> task = Task("brightness", [black], {"accuracy": correct}, headline="accuracy")
    >>> task.metrics[task.headline](["dark"], task.examples)
    tensor([1.])
    """

    name: str
    examples: Sequence[Example]
    metrics: dict[str, Metric]
    headline: str
    target: str = ""  # the sentence that targeted attacks force
    description: str = ""
    licence: str = ""
