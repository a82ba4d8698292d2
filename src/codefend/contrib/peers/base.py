"""Shared parts of the peers: another paper's purifier on our network, started from our prior, on our images.

As in `purifiers.nets`, everything is in VE coordinates on [0, 1] pixels and the network predicts the clean image,
here ``D``; a velocity or a noise prediction is a linear function of it, so each paper's loss is a squared error of D
with the weight that its own target implies. Steps and batch are the bridge's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Generator, Tensor

from codefend import victims
from codefend.core.devices import default_device
from codefend.core.seeds import make_generator
from codefend.purifiers.nets import PurifierNet
from codefend.tasks.training_images import draw_training_images
from codefend.training.banks import Bank
from codefend.training.fit import Losses, MovingAverage, Training, fit
from codefend.training.nets import load_prior, net_training
from codefend.types import CodefendError
from codefend.victims.pocket import Pocket

SMALLEST = 1e-3  # of times and noise levels in training: below it float32 rounding decides the target

Batch = tuple[Tensor, Tensor | None]  # clean [B,3,H,W], adversarial images or None where the method needs none
# (network, clean, adversarial, number of the batch, noise) -> weighted terms
PeerLoss = Callable[[PurifierNet, Tensor, Tensor, int, Generator], Losses]


@dataclass(frozen=True)
class PeerConfig:
    """Settings of every peer."""

    method: ClassVar[str]

    prior: str = ""  # weights folder to fine-tune from; empty: the shipped prior
    seed: int = 0
    steps: int = 1200
    batch: int = 16
    lr: float = 8e-4
    warmup: int = 50
    save_every: int = 50  # steps

    def load_loss(self) -> PeerLoss:
        """The loss, with the networks that it needs. Raises CodefendError when one is missing."""
        raise NotImplementedError

    def purifier_options(self) -> dict[str, float]:
        """The settings of the training that the purifier needs."""
        return {}

    def train(self, folder: str | Path) -> Path:
        """Train in ``folder`` and return the folder with the weights; the same call resumes.

        Raises CodefendError when pairs, prior or victim are missing, or the folder was made with another config.
        """
        recorded = {"train": "peer", "method": self.method, **asdict(self)}
        return fit(folder, recorded, lambda: _training(self, Path(folder))) / "weights"


@dataclass(frozen=True)
class PairsPeerConfig(PeerConfig):
    """Settings of a peer that is trained on the static pairs of banks."""

    pairs: tuple[str, ...] = ()  # bank folders made by `codefend pairs`
    without: tuple[str, ...] = ()  # attack kinds and target networks of the banks that are left out
    clean: float = 0.0  # share of pairs whose adversarial image is the clean one


def _training(config: PeerConfig, folder: Path) -> Training[Batch]:
    bank = Bank(config.pairs, without=config.without) if isinstance(config, PairsPeerConfig) else None
    peer_loss, options = config.load_loss(), config.purifier_options()
    net = start_from_prior(config).to(default_device()).train()

    def loss(batch: Batch, number: int) -> Losses:
        clean = batch[0].to(default_device())
        attacked = clean if batch[1] is None else batch[1].to(default_device())
        return peer_loss(net, clean, attacked, number, make_generator(config.seed, config.method, number))

    batch = partial(_batch, config, bank)
    return net_training(config, folder, config.method, MovingAverage(net), batch=batch, loss=loss, options=options)


def start_from_prior(config: PeerConfig) -> PurifierNet:
    """The prior's weights; no bound on the residual, which none of the papers has."""
    return load_prior(config.prior, residual_bound=None)


def load_pocket(victim: str, method: str) -> Pocket:
    """The pocket victim whose words guide. Raises CodefendError for any other victim."""
    pocket = victims.load(victim)
    if not isinstance(pocket, Pocket):
        raise CodefendError(f"{method} is guided by a pocket victim, not {pocket.name}")
    return pocket


def _batch(config: PeerConfig, bank: Bank | None, number: int) -> Batch:
    rng = np.random.default_rng([config.seed, 9, number])
    if bank is None or not isinstance(config, PairsPeerConfig):
        return draw_training_images(rng, config.batch, first_scene=3_000_000 + number * config.batch), None
    clean, attacked = bank.draw(rng, config.batch)
    untouched = round(config.clean * config.batch)
    return clean, torch.cat([clean[:untouched], attacked[untouched:]])


def mean_square(images: Tensor, references: Tensor) -> Tensor:
    """Mean squared error of each image, ``[B]``."""
    return (images - references).square().flatten(1).mean(1)
