"""Vision tokens of photographs for the pocket victim, whose connector was trained on drawn scenes alone.

Where an image looks like a photograph, the connector's tokens give way to others that carry the ImageNet classes of the
pocket's own encoder: a few tokens that say "photograph", one for how sure the encoder is, and the words of the class
names, mixed by the class probabilities. All is differentiable down to the pixels, and on scenes it changes nothing.

Shape legend: B batch, T vision tokens (16), W the encoder's width, C classes (1000), N words of a name (8), D the
language model's width (576).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from codefend.core.checkpoints import load_weights
from codefend.encoders import CLASS_SIDE, SURE, class_names
from codefend.encoders.base import Classifier, Encoder
from codefend.encoders.views import fit_square
from codefend.types import CodefendError

TOKENS = 16  # T
NAME_TOKENS = 8  # N; no class name is longer
FRAME_TOKENS = TOKENS - 1 - NAME_TOKENS  # before the token of confidence and the names
SHARPNESS = 4.0  # power of the class probabilities, so that the first class dominates the mixture
STEEPNESS = 20.0  # of the step at SURE

Embed = Callable[[Sequence[str]], list[Tensor]]


def class_scores(encoder: Encoder, images: Tensor) -> Tensor:
    """Logits ``[B, C]`` of the classes, in the view of the images that the encoder names them in."""
    assert isinstance(encoder, Classifier)  # as `build` has checked
    return encoder.logits(fit_square(images, CLASS_SIDE))


class PhotographGate(nn.Module):
    """Logistic regression: 1 for photographs, exactly 0 for scenes, in between in a small band.

    ``vocabulary`` ``[V, D]``: unit embeddings of the connector's words, which occur in scenes and not in photographs.
    """

    vocabulary: Tensor

    def __init__(self, width: int, vocabulary: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(3 * width + TOKENS)), nn.Parameter(torch.zeros(()))
        self.register_buffer("vocabulary", vocabulary, persistent=False)

    def forward(self, tokens: Tensor, words: Tensor) -> Tensor:
        """``[B]`` in [0, 1] of encoder tokens ``[B, T, W]`` and the connector's words for them ``[B, T, D]``."""
        return (self.statistics(tokens, words) @ self.weight + self.bias).clamp(0, 1)

    def statistics(self, tokens: Tensor, words: Tensor) -> Tensor:
        """``[B, 3 W + T]``: mean, deviation and maximum of the tokens, and each word's best cosine, largest first."""
        scores = (F.normalize(words, dim=-1) @ self.vocabulary.T).amax(-1).sort(dim=1, descending=True).values
        return torch.cat([tokens.mean(1), tokens.std(1), tokens.amax(1), scores], dim=1)


class PhotographTokens(nn.Module):
    """Vision tokens from class probabilities, and the gate that decides where they replace the connector's.

    ``width`` W of the encoder; ``names`` ``[C, N, D]``: embeddings of each class name's words, filled up with newlines;
    ``vocabulary`` ``[V, D]``: unit embeddings of the connector's words.
    """

    names: Tensor

    def __init__(self, width: int, names: Tensor, vocabulary: Tensor) -> None:
        super().__init__()
        self.gate = PhotographGate(width, vocabulary)
        self.frame = nn.Parameter(torch.zeros(FRAME_TOKENS, names.shape[-1]))
        self.confidence = nn.Parameter(torch.zeros(2, names.shape[-1]))  # unsure, sure
        self.place = nn.Parameter(torch.zeros(NAME_TOKENS, names.shape[-1]))
        self.register_buffer("names", names, persistent=False)

    def tokens(self, probabilities: Tensor) -> Tensor:
        """``[B, T, D]`` of class probabilities ``[B, C]``."""
        powers = probabilities.clamp(min=1e-6) ** SHARPNESS
        words = torch.einsum("bc,cnd->bnd", powers / powers.sum(1, keepdim=True), self.names)
        sure = torch.sigmoid(STEEPNESS * (probabilities.amax(1, keepdim=True) - SURE))
        confidence = torch.cat([1 - sure, sure], dim=1) @ self.confidence
        frame = self.frame.expand(len(powers), -1, -1)
        return torch.cat([frame, confidence[:, None], words + self.place], dim=1)

    def blend(self, vision: Tensor, words: Tensor, tokens: Tensor, images: Tensor, encoder: Encoder) -> Tensor:
        """The connector's tokens ``vision`` ``[B, T, D]``, replaced where ``images`` are photographs.

        ``words`` are these without their positions, and ``tokens`` ``[B, T, W]`` the encoder's.
        """
        share = self.gate(tokens, words)
        chosen = share.nonzero()[:, 0]
        if not len(chosen):
            return vision
        probabilities = class_scores(encoder, images[chosen]).softmax(-1)
        weight = share[chosen, None, None]
        mixed = (1 - weight) * vision[chosen] + weight * self.tokens(probabilities)
        return vision.index_copy(0, chosen, mixed)


def build(encoder: Encoder, phrases: Sequence[str], embed: Embed) -> PhotographTokens:
    """The module before training, for a pocket with this encoder, vocabulary and token embeddings of texts.

    Raises CodefendError when the encoder has no classes or the vocabulary is empty.
    """
    if not isinstance(encoder, Classifier) or not phrases:
        raise CodefendError(
            f"photographs need an encoder with classes and a pocket with a vocabulary; {encoder.name!r} has none"
        )
    newline = embed(["\n"])[0].expand(NAME_TOKENS, -1)
    names = [torch.cat([row, newline])[:NAME_TOKENS] for row in embed([f" {name}" for name in class_names()])]
    vocabulary = F.normalize(torch.stack([row.mean(0) for row in embed(phrases)]), dim=-1)
    return PhotographTokens(encoder.width, torch.stack(names), vocabulary)


def load(folder: Path, encoder: Encoder, phrases: Sequence[str], embed: Embed) -> PhotographTokens:
    """As `build`, with the weights of ``folder``. Also raises CodefendError when it holds none that fit."""
    module = build(encoder, phrases, embed)
    try:
        module.load_state_dict(load_weights(folder / "model.safetensors"))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CodefendError(
            f"{folder} holds no weights for photographs that fit this pocket ({error}); "
            "train some with `codefend train pocket-photographs`"
        ) from error
    return module.requires_grad_(False).eval()
