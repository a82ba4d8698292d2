"""The training of a purifier's network: initial weights, AdamW, a schedule, and a moving average that is saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from codefend.core.assets import asset, find_asset
from codefend.purifiers import current_spec
from codefend.purifiers.nets import PurifierNet, load_net, save_net
from codefend.training.card import write_card
from codefend.training.fit import Losses, MovingAverage, Training, cosine_rate
from codefend.types import CodefendError

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
    shipped = None if Path(folder).is_dir() else find_asset(f"weights/{current_spec(folder).name}")
    prior, _ = load_net(shipped or folder or asset("weights/prior"))
    net = PurifierNet(replace(prior.config, residual_bound=residual_bound))
    net.load_state_dict(prior.state_dict())
    return net


def grow(old: PurifierNet, *, channels: Sequence[int] = (), blocks: Sequence[int] = (), seed: int = 0) -> PurifierNet:
    """Return ``old`` with more channels or blocks at some of its resolutions (empty: as many as it has).

    As Net2Net (Chen et al. 2016, arXiv 1511.05641), but new channels of the residual stream start at zero instead of as
    copies, and the layers that read them at random, so that they learn. Exact for new blocks. New channels reduce the
    norms' denominators; the norms' weights compensate for that except for the stream's mean. Raises CodefendError for
    fewer channels or blocks than there are, or for other resolutions.
    """
    config = replace(
        old.config, channels=tuple(channels) or old.config.channels, blocks=tuple(blocks) or old.config.blocks
    )
    for name in ("channels", "blocks"):
        sizes, present = getattr(config, name), getattr(old.config, name)
        if len(sizes) != len(present) or any(a < b for a, b in zip(sizes, present, strict=True)):
            raise CodefendError(
                f"{name}={sizes}: a network only grows, from {present}, at the same {len(present)} resolutions"
            )
    if config == old.config:
        return old
    torch.manual_seed(seed)  # the new weights only
    new = PurifierNet(config)
    known = dict(old.named_parameters())
    with torch.no_grad():
        for name, parameter in new.named_parameters():
            if name in known:
                _initialize(name, parameter, known[name])
    return new


def _initialize(name: str, new: Tensor, old: Tensor) -> None:
    """Copy ``old`` into the first indices of ``new``, and initialize the others."""
    layer = name.split(".")[-2]
    if layer == "film":  # scales of all channels, then their shifts
        new, old = new.unflatten(0, (2, -1)), old.unflatten(0, (2, -1))
        new.zero_()
    elif layer == "norm":
        share = (len(old) / len(new)) ** 0.5
        new.fill_(share if name.endswith("weight") else 0.0)
        old = old * share if name.endswith("weight") else old
    elif layer == "conv2":
        new.zero_()  # reads no new hidden channels yet, and writes to none of the stream's
    elif layer != "conv1":
        written = 1 if name.startswith("ups.") and new.dim() == 4 else 0  # the dimension of the outputs
        new.narrow(written, old.shape[written], new.shape[written] - old.shape[written]).zero_()
    new[tuple(slice(size) for size in old.shape)] = old
