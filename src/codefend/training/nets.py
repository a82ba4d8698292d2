"""The training of a purifier's network: initial weights, AdamW, a schedule, and a moving average that is saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch.optim.lr_scheduler import LambdaLR

from codefend.core.assets import asset, find_asset
from codefend.purifiers.nets import PurifierNet, load_net, save_net
from codefend.training.card import write_card
from codefend.training.fit import Losses, MovingAverage, Training, cosine_rate

Batch = TypeVar("Batch")


class NetTrainingConfig(Protocol):
    """The settings that `net_training` reads."""

    @property
    def steps(self) -> int: ...
    @property
    def lr(self) -> float: ...
    @property
    def warmup(self) -> int: ...
    @property
    def save_every(self) -> int: ...


def net_training(
    config: NetTrainingConfig,
    folder: Path,
    kind: str,
    average: MovingAverage[PurifierNet],
    *,
    batch: Callable[[int], Batch],
    loss: Callable[[Batch, int], Losses],
    options: Mapping[str, Any] | None = None,
    micro: int = 1,
    rate: Callable[[int], float] | None = None,
) -> Training[Batch]:
    """Train the network that ``average`` follows; the average is written to ``folder/weights`` in 16 bits, with a card.

    ``kind`` and ``options`` are saved with the weights, see `save_net`. ``rate``: factor of the learning rate by step;
    by default `cosine_rate`.
    """
    parameters = dict(average.source.named_parameters())
    optimizer = torch.optim.AdamW(parameters.values(), lr=config.lr, betas=(0.9, 0.99))

    def save(step: int) -> None:
        save_net(folder / "weights", average.module, kind=kind, options=options, dtype=torch.float16)
        write_card(folder, kind)

    return Training(
        parameters=parameters,
        batch=batch,
        loss=loss,
        optimizer=optimizer,
        schedule=LambdaLR(optimizer, rate or partial(cosine_rate, steps=config.steps, warmup=config.warmup)),
        average=average,
        steps=config.steps,
        save=save,
        save_every=config.save_every,
        micro=micro,
    )


def load_prior(folder: str, *, residual_bound: float | None) -> PurifierNet:
    """The network of a prior or a bridge, by folder or shipped name, with this residual bound; "": the shipped prior.

    Raises CodefendError when the folder holds no weights.
    """
    shipped = None if Path(folder).is_dir() else find_asset(f"weights/{folder}")
    prior, _ = load_net(shipped or folder or asset("weights/prior"))
    net = PurifierNet(replace(prior.config, residual_bound=residual_bound))
    net.load_state_dict(prior.state_dict())
    return net
