"""Training of a soft prefix: prompt tuning (Lester et al. 2021, arXiv 2104.08691) on clean and attacked images.

The ``[K, D]`` embeddings minimize the mean negative log-likelihood of the correct answers under the frozen victim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from codefend.prompts.items import Item
from codefend.prompts.soft import SoftPolicy, open_weight
from codefend.training.fit import Losses, Training
from codefend.training.prompt_search.policy_training import draw_items, policy_schedule
from codefend.types import Victim


@dataclass(frozen=True)
class SoftConfig:
    """How a soft prefix is trained. It starts as the embeddings of ``start``, cut or repeated to ``tokens``."""

    tokens: int = 12
    steps: int = 240
    batch: int = 4
    lr: float = 3e-3
    warmup: int = 10
    clean_share: float = 0.4  # of a batch: clean items, to preserve the clean score
    check_every: int = 60  # steps between candidates, which are evaluated on the selection set
    start: str = "Answer from what the picture shows and nothing else."


class ItemBatch(NamedTuple):
    """``images`` ``[B, 3, H, W]`` with the text of the victim's loss."""

    images: Tensor
    prompts: list[str]
    answers: list[str]


def soft_training(
    victim: Victim,
    items: Sequence[Item],
    config: SoftConfig,
    on_candidate: Callable[[SoftPolicy], None],
    *,
    seed: int = 0,
) -> Training[ItemBatch]:
    """The training of a prefix on ``items``; ``on_candidate`` receives it every ``check_every`` steps and at the end.

    Raises CodefendError when the victim takes no embeddings.
    """
    model = open_weight(victim)
    prefix = torch.nn.Parameter(start_prefix(model, config))
    optimizer = torch.optim.Adam([prefix], lr=config.lr)

    def loss(batch: ItemBatch, step: int) -> Losses:
        return {"loss": model.loss(*batch, prefix=prefix).mean()}

    return Training(
        parameters={"prefix": prefix},
        batch=partial(draw_batch, items, config, seed),
        loss=loss,
        optimizer=optimizer,
        schedule=policy_schedule(optimizer, config.steps, config.warmup),
        steps=config.steps,
        save=lambda step: on_candidate(SoftPolicy(f"soft-{step:04d}", prefix.detach().clone(), victim.name)),
        save_every=config.check_every,
    )


def start_prefix(victim: Any, config: SoftConfig) -> Tensor:
    """``[K, D]``, the embeddings of ``config.start``, cut or repeated."""
    embeddings: Tensor = victim.embed([config.start or "."])[0].detach()
    repeats = -(-config.tokens // len(embeddings))
    return embeddings.repeat(repeats, 1)[: config.tokens].clone()


def draw_batch(items: Sequence[Item], config: SoftConfig, seed: int, step: int) -> ItemBatch:
    """The batch of a step, see `draw_items`."""
    batch = draw_items(items, config.batch, config.clean_share, seed, step)
    return ItemBatch(torch.stack([item.image for item in batch]), [i.prompt for i in batch], [i.answer for i in batch])
