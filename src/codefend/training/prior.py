"""Train the unconditional diffusion prior: DiffPure's denoiser, and where the bridge starts from."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Generator, Tensor

from codefend.core.devices import default_device
from codefend.core.seeds import make_generator, noise_like
from codefend.purifiers.nets import Denoiser, NetConfig, PurifierNet, preconditioning
from codefend.tasks.training_images import draw_training_images
from codefend.training.fit import Losses, MovingAverage, Training, fit
from codefend.training.nets import net_training


@dataclass(frozen=True)
class PriorConfig:
    """Settings of the prior's training."""

    net: NetConfig = field(default_factory=NetConfig)
    seed: int = 0
    steps: int = 1600
    batch: int = 16
    side: int = 96  # pixels of the random crops: the network is local, and small crops are cheap
    lr: float = 1e-3
    warmup: int = 50
    save_every: int = 100  # steps

    def train(self, folder: str | Path) -> Path:
        """Train in ``folder`` and return the folder with the weights; the same call resumes.

        Raises CodefendError when the image packages are missing or the folder was made with another config.
        """
        recorded = {"train": "prior", **self.__dict__, "net": self.net.__dict__}
        return fit(folder, recorded, lambda: _training(self, Path(folder))) / "weights"


def _training(config: PriorConfig, folder: Path) -> Training[Tensor]:
    torch.manual_seed(config.seed)  # the network's initial weights only
    net = PurifierNet(config.net).to(default_device()).train()

    def loss(clean: Tensor, step: int) -> Losses:
        generator = make_generator(config.seed, "prior", step)
        sigma = sample_sigmas(config.batch, generator=generator).to(default_device())
        return {"loss": prior_loss(net, clean.to(default_device()), sigma, generator=generator).mean()}

    return net_training(config, folder, "prior", MovingAverage(net), batch=partial(_images, config), loss=loss)


def sample_sigmas(
    count: int,
    *,
    log_mean: float = -2.4,
    log_std: float = 1.0,
    low: float = 2e-3,  # pixels in [0, 1]
    high: float = 0.65,  # VP time 0.31: above every t that purification uses
    generator: Generator | None = None,
) -> Tensor:
    """Log-normal training noise levels ``[count]`` (EDM, Table 1: P_mean, P_std), shifted to VP times up to 0.3."""
    return (torch.randn(count, generator=generator) * log_std + log_mean).exp().clamp(low, high)


def prior_loss(net: Denoiser, clean: Tensor, sigma: Tensor, *, generator: Generator | None = None) -> Tensor:
    """Denoising loss of the unconditional prior, ``[B]``: lambda(sigma) ||D(x + sigma n; sigma) - x||^2 (EDM, eq. 2).

    lambda = 1 / c_out^2 weights the raw network's squared error equally at every level (EDM, eq. 8).
    """
    noisy = clean + sigma.view(-1, 1, 1, 1) * noise_like(clean, generator)
    s = torch.zeros_like(sigma)
    error = (net(noisy, s, sigma) - clean).square().flatten(1).mean(1)
    return error / preconditioning(s, sigma).c_out ** 2


def _images(config: PriorConfig, step: int) -> Tensor:
    rng = np.random.default_rng([config.seed, 3, step])
    return crops(draw_training_images(rng, config.batch, first_scene=step * config.batch), config.side, rng)


def crops(images: Tensor, side: int, rng: np.random.Generator) -> Tensor:
    """A random ``side`` x ``side`` window of each image, ``[B, 3, side, side]``."""
    if side >= images.shape[-1]:
        return images
    tops, lefts = rng.integers(0, images.shape[-1] - side + 1, (2, len(images)))
    return torch.stack([p[:, t : t + side, x : x + side] for p, t, x in zip(images, tops, lefts, strict=True)])
