"""Initialize a larger network from a smaller one's weights, with nearly the same outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from codefend.purifiers.nets import PurifierNet
from codefend.types import CodefendError


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
