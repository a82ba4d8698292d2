"""CoDefend-R: our reconstruction of CoDefend (Zhu et al. 2025, arXiv 2510.11096), on the static pairs of a bank.

We know no public code or tables of the paper. As ADBM it is a bridge at large noise, and `DiffPure` with eta 0 at test
time; the vision tokens of its prediction are aligned with the clean image's words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from codefend.contrib.peers.adbm import adbm_loss, adbm_predict, sample_bridge_levels
from codefend.contrib.peers.base import PairsPeerConfig, PeerLoss, load_pocket
from codefend.core.seeds import noise_like
from codefend.purifiers.base import clip
from codefend.purifiers.nets import PurifierNet
from codefend.training.fit import Losses
from codefend.training.frozen import WORDS
from codefend.victims.pocket import Pocket


@dataclass(frozen=True)
class CodefendRConfig(PairsPeerConfig):
    """The settings that determine the weights."""

    method: ClassVar[str] = "codefend-r"

    victim: str = "pocket"  # whose words guide
    times: tuple[float, float] = (0.15, 0.15)  # range of the VP time of the bridge's far end
    w_alignment: float = 0.1

    def load_loss(self) -> PeerLoss:
        return codefend_r_loss(self, load_pocket(self.victim, self.method))


def codefend_r_loss(config: CodefendRConfig, pocket: Pocket) -> PeerLoss:
    """ADBM's loss on static pairs, and the alignment."""

    def loss(net: PurifierNet, clean: Tensor, attacked: Tensor, number: int, generator: Generator) -> Losses:
        sigma, end = sample_bridge_levels(len(clean), times=config.times, generator=generator)
        sigma, noise = sigma.to(clean), noise_like(clean, generator)
        prediction = adbm_predict(net, clean, attacked, sigma, end, noise)
        terms = {"bridge": adbm_loss(prediction, clean, sigma).mean()}
        if config.w_alignment:
            terms["alignment"] = config.w_alignment * misalignment(pocket, prediction, clean).mean()
        return terms

    return loss


def misalignment(pocket: Pocket, prediction: Tensor, clean: Tensor) -> Tensor:
    """1 - cosine of each vision token to the nearest word of the clean image's token, ``[B, T]``.

    It stands in for the paper's "cross-modal alignment", of which no formula is public.
    """
    with torch.no_grad():
        words = pocket.word_scores(clean, WORDS).argmax(-1, keepdim=True)
    return 1 - pocket.word_scores(clip(prediction), WORDS).gather(-1, words).squeeze(-1)
