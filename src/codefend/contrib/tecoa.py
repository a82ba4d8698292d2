"""TeCoA-style: fine-tune a pocket's encoder adversarially, words as labels (Mao et al. 2023, arXiv 2212.07016).

TeCoA's loss is the cross-entropy between an adversarial image and the text of its class. A pocket reads a word in every
vision token: the labels are those that the original encoder gives on the clean image, and the table of words is the
language model's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from codefend.attacks.objectives import word_loss
from codefend.contrib.fare import FareConfig, adversarial_loss, pocket_folder
from codefend.core.devices import default_device
from codefend.encoders.base import Encoder
from codefend.training.fit import Losses
from codefend.training.frozen import WORDS
from codefend.victims.pocket import Pocket, load_unmerged


@dataclass(frozen=True)
class TecoaConfig(FareConfig):
    """The settings that determine the encoder: FARE's, with another loss."""

    kind: ClassVar[str] = "tecoa"

    def loss(self, encoder: Encoder, original: Encoder) -> Callable[[Tensor, int], Losses]:
        """The loss of a clean batch at a step."""
        pocket = load_unmerged(pocket_folder(self.victim)).to(default_device())
        return lambda clean, step: tecoa_loss(self, pocket, encoder, original, clean, step)


def tecoa_loss(
    config: FareConfig, pocket: Pocket, encoder: Encoder, original: Encoder, clean: Tensor, step: int
) -> Losses:
    """The cross-entropy of the vision tokens' words, "loss" on adversarial images and "clean" on the clean ones."""
    table = F.normalize(torch.stack([embedding.mean(0) for embedding in pocket.embed(WORDS)]), dim=-1)

    def scores(phi: Encoder, images: Tensor) -> Tensor:
        return F.normalize(pocket.connector.words(phi(images)), dim=-1) @ table.T

    with torch.no_grad():
        labels = scores(original, clean).argmax(-1)
    return adversarial_loss(config, encoder, lambda images: word_loss(scores(encoder, images), labels), clean, step)
