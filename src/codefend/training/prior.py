"""Train the unconditional diffusion prior: DiffPure's denoiser, and where the bridge starts from."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch

from codefend.core.devices import default_device, mixed_precision
from codefend.core.runs import make_generator, open_run, progress
from codefend.purifiers.diffusion import prior_loss, sample_sigmas
from codefend.purifiers.nets import NetConfig, PurifierNet, save_net
from codefend.tasks.training_images import training_pictures
from codefend.training.card import write_card
from codefend.training.feed import feed
from codefend.training.state import Average, cosine_rate, descend, restore_training, save_training, set_rate


@dataclass(frozen=True)
class PriorConfig:
    """Everything that decides the prior's weights."""

    net: NetConfig = field(default_factory=NetConfig)
    seed: int = 0
    steps: int = 1600
    batch: int = 16
    side: int = 96  # pixels of the random crops: the network is local, and small crops are cheap
    lr: float = 1e-3
    warmup: int = 50
    save_every: int = 100  # steps


def train_prior(config: PriorConfig, folder: str | Path) -> Path:
    """Train in ``folder`` and return the folder with the weights; the same call resumes.

    Raises CodefendError when the picture packages are missing or the folder was made with another config.
    """
    run = open_run(folder, {"train": "prior", **config.__dict__, "net": config.net.__dict__})
    torch.manual_seed(config.seed)  # the network's initial weights only
    device = default_device()
    net = PurifierNet(config.net).to(device).train()
    groups = [{"params": list(net.parameters()), "base": config.lr}]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, weight_decay=0.01, betas=(0.9, 0.99))
    parameters = dict(net.named_parameters())
    average, checkpoint = Average(parameters), run.dir / "checkpoint.safetensors"
    step = restore_training(checkpoint, parameters, optimizer, average)
    with progress("prior", config.steps, done=step) as advance:
        for clean in feed(partial(_pictures, config), step, config.steps, device):
            started = time.perf_counter()
            set_rate(optimizer, cosine_rate(step, config.steps, warmup=config.warmup))
            draw = make_generator(config.seed, "prior", step)
            sigma = sample_sigmas(config.batch, generator=draw).to(device)
            with mixed_precision(device):
                loss = prior_loss(net, clean.to(device), sigma, generator=draw).mean()
            norm = descend(optimizer, loss)
            average.update(parameters)
            step += 1
            row = {"loss": loss.item(), "grad_norm": norm, "seconds": time.perf_counter() - started}
            run.append({"key": f"step-{step}", "step": step, **row})
            advance(1, f"loss {loss.item():.3f}")
            if step % config.save_every == 0 or step == config.steps:
                averaged = PurifierNet(config.net)
                averaged.load_state_dict(average.values)
                save_net(run.dir / "weights", averaged, kind="prior", dtype=torch.float16)
                write_card(run, "prior")
                save_training(checkpoint, parameters, optimizer, step, average)  # last: then the weights are there
    return run.dir / "weights"


def _pictures(config: PriorConfig, step: int) -> torch.Tensor:
    rng = np.random.default_rng([config.seed, 3, step])
    return crops(training_pictures(rng, config.batch, first_scene=step * config.batch), config.side, rng)


def crops(pictures: torch.Tensor, side: int, rng: np.random.Generator) -> torch.Tensor:
    """A random ``side`` x ``side`` window of each picture, ``[B, 3, side, side]``."""
    if side >= pictures.shape[-1]:
        return pictures
    tops, lefts = rng.integers(0, pictures.shape[-1] - side + 1, (2, len(pictures)))
    return torch.stack([p[:, t : t + side, x : x + side] for p, t, x in zip(pictures, tops, lefts, strict=True)])
