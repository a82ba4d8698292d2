"""An image encoder as a victim: it has features, and its answer is the ImageNet class."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from codefend.core.specs import parse_encoders
from codefend.encoders.base import Classifier
from codefend.encoders.views import View, ViewedEncoder
from codefend.types import CodefendError

PREFIX = "encoder:"


class EncoderVictim(ViewedEncoder):
    """The encoder of that name in `codefend.encoders`; with ``side``, images are resized to that side in pixels.

    Raises CodefendError for an unknown encoder or one without classes.
    """

    greedy = True
    encoder: Classifier

    def __init__(self, encoder: str, side: int | None = None) -> None:
        super().__init__(encoder)
        if not isinstance(self.encoder, Classifier):
            raise CodefendError(f"encoder {encoder!r} has no classes to answer with; use one of the named encoders")
        self.name, self.side = encoder if side is None else f"{encoder}@{side}", side

    @torch.no_grad()
    def generate(self, images: Tensor, prompts: Sequence[str]) -> list[str]:
        """The number of the ImageNet-1k class of each image, as text; prompts are ignored."""
        classes: list[int] = self.encoder.logits(self.viewed(images)).argmax(1).tolist()
        return [str(number) for number in classes]

    def viewed(self, images: Tensor) -> Tensor:
        """The images on the encoder's device, resized to ``side`` or to their own longer side, rounded."""
        view = View(self.side or max(32, round(max(images.shape[-2:]) / 32) * 32))
        return view(images.to(self.encoder.device))


def load_encoder(spec: str) -> EncoderVictim:
    """The encoder of ``encoder:NAME`` or ``encoder:NAME@SIDE``. Raises CodefendError for another."""
    ((name, side),) = parse_encoders(spec.removeprefix(PREFIX))
    return EncoderVictim(name, side)
