"""HGD: high-level guided denoiser (Liao et al. 2018, arXiv 1712.02976): one residual evaluation, guided by features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from codefend.contrib.peers.base import PairsPeerConfig, PeerLoss
from codefend.encoders.views import ViewedEncoder
from codefend.purifiers.base import NetPurifier, clip
from codefend.purifiers.nets import PurifierNet, per_image
from codefend.training.fit import Losses


@dataclass(frozen=True)
class HgdConfig(PairsPeerConfig):
    """The settings that determine the weights."""

    method: ClassVar[str] = "hgd"

    clean: float = 0.15
    encoders: tuple[str, ...] = ("lite0", "lite2")  # guide by their features, one a step in turn

    def load_loss(self) -> PeerLoss:
        return hgd_loss([ViewedEncoder(name) for name in self.encoders])


def hgd_loss(encoders: list[ViewedEncoder]) -> PeerLoss:
    """HGD's loss, guided by each of the frozen encoders in turn."""

    def loss(net: PurifierNet, clean: Tensor, attacked: Tensor, number: int, generator: Generator) -> Losses:
        encoder = encoders[number % len(encoders)]
        with torch.no_grad():
            features = encoder.features(clean)
        ones = clean.new_ones(len(clean))
        denoised = clip(net(attacked, ones, 0 * ones))
        return {"features": feature_distance(encoder.features(denoised), features).mean()}

    return loss


def feature_distance(features: Tensor, clean: Tensor) -> Tensor:
    """Feature-guided loss (FGD): L1 between a network's features of the denoised and of the clean image, ``[B]``.

    Both ``[B, T, D]``; relative to the mean magnitude of the clean ones, so that several encoders weigh alike.
    """
    return (features - clean).abs().flatten(1).mean(1) / clean.abs().flatten(1).mean(1)


@dataclass(frozen=True)
class HgdOptions:
    """HGD has none."""


class Hgd(NetPurifier):
    """x - d(x), one evaluation."""

    name, kind, evaluations = "hgd", "hgd", 1
    options_class = HgdOptions

    def denoise(self, images: Tensor, generator: Generator | None) -> Tensor:
        denoised: Tensor = self.net(images, per_image(1.0, images), per_image(0.0, images))
        return denoised
