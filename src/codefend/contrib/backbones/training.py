"""Fine-tune diffusers models on pairs: pixel models as bridges, Stable Diffusion with LoRA in latents.

Both predict the clean image from a point between it and the adversarial one: x = x_c + k (x_a - x_c) + k sigma n, k in
(0, 1], where shift and noise shrink together as they do in purification (`purifiers.bridge`,
`diffpure.denoise_from` with eta 0). In latents, with sigma the level of time t, that is the directed denoising of
CoDefend-R and ADBM (arXiv 2408.00315): the noise to predict is n + (x_a - x_c) / sigma.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from codefend.contrib.backbones.latent import add_adapters, load_latents, save_adapters
from codefend.contrib.backbones.pixels import load_denoiser, save_denoiser
from codefend.contrib.backbones.vp import VPDenoiser
from codefend.core.devices import default_device
from codefend.core.seeds import make_generator, noise_like
from codefend.encoders.views import ViewedEncoder
from codefend.purifiers.bridge import bridge_state, charbonnier, sample_bridge_times
from codefend.training.banks import StreamedBank
from codefend.training.card import write_card
from codefend.training.fit import Losses, MovingAverage, Training, cosine_schedule, fit
from codefend.types import CodefendError

Batch = tuple[Tensor, Tensor]  # clean and adversarial images [B,3,H,W]


@dataclass(frozen=True)
class BackboneConfig:
    """Settings of both kinds."""

    model: str = ""  # a diffusers model, id or folder
    pairs: tuple[str, ...] = ()  # bank folders made by `codefend pairs`, also as Parquet; streamed
    encoders: tuple[str, ...] = ()  # guide by their features, one a micro-batch in turn; none: no guidance
    w_features: float = 1.0
    clean: float = 0.15  # share of images that are not attacked
    seed: int = 0
    steps: int = 1200
    batch: int = 8
    micro: int = 1  # micro-batches a step, shared by the processes of `accelerate launch`
    lr: float = 1e-4
    warmup: int = 50
    save_every: int = 50  # steps


@dataclass(frozen=True)
class HFBridgeConfig(BackboneConfig):
    """A pixel model, all of whose weights are trained; moments and average take three more times its memory."""

    noise: float = 0.0  # in the adversarial image, pixels in [0, 1]

    def train(self, folder: str | Path) -> Path:
        """As `train_backbone`."""
        return train_backbone(self, folder, "hf-bridge", partial(PixelTuner, self))


@dataclass(frozen=True)
class LatentConfig(BackboneConfig):
    """A latent model with adapters on every attention; its own weights stay frozen."""

    rank: int = 16
    t: float = 0.15  # share of the model's steps that the attacked latent is noised to
    purify_steps: int = 4  # of the purifier that is saved; has no effect on training

    def train(self, folder: str | Path) -> Path:
        """As `train_backbone`."""
        return train_backbone(self, folder, "latent", partial(LatentTuner, self))


class Tuner(Protocol):
    """One kind of model: what is trained, its loss on a micro-batch, and how its weights are written."""

    parameters: dict[str, nn.Parameter]

    def loss(self, clean: Tensor, attacked: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """The loss, a scalar, and the purified images ``[B,3,H,W]``."""
        ...

    def save(self, folder: Path, average: Mapping[str, Tensor]) -> None:
        """Write the averaged parameters as a purifier's folder."""
        ...


class PixelTuner:
    """A pixel model as a bridge; the same loss as the first term of `training.bridge`."""

    def __init__(self, config: HFBridgeConfig, device: torch.device) -> None:
        self.config, self.net = config, load_denoiser(config.model).to(device)
        self.net.model.requires_grad_(True)
        self.parameters = {name: p for name, p in self.net.model.named_parameters() if p.requires_grad}

    def loss(self, clean: Tensor, attacked: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        s = sample_bridge_times(len(clean), at_one=0.6, generator=generator).to(clean)
        x, level = bridge_state(clean, attacked, s, self.config.noise, generator=generator)
        prediction = self.net(x, s, level)
        return 8.0 * charbonnier(prediction, clean).mean(), prediction

    def save(self, folder: Path, average: Mapping[str, Tensor]) -> None:
        net: VPDenoiser = deepcopy(self.net)
        for name, parameter in net.model.named_parameters():
            parameter.data.copy_(average[name])
        save_denoiser(net.cpu(), folder)


class LatentTuner:
    """Stable Diffusion with adapters; encoder and decoder stay frozen."""

    def __init__(self, config: LatentConfig, device: torch.device) -> None:
        if not 0 < config.t <= 1:
            raise CodefendError(f"t must be above 0 and at most 1, got {config.t:g}: training needs noise")
        self.config, self.latents = config, load_latents(config.model)
        with torch.random.fork_rng():  # the adapters' first weights
            torch.manual_seed(config.seed)
            self.parameters = add_adapters(self.latents, config.rank)
        self.latents.to(device)
        self.sigma = float(self.latents.denoiser.levels(config.t, 1)[0])

    def loss(self, clean: Tensor, attacked: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            z_c, z_a = self.latents.encode(clean), self.latents.encode(attacked)
        k = sample_bridge_times(len(clean), generator=generator).clamp_min(1e-2).to(clean).view(-1, 1, 1, 1)
        sigma = k * self.sigma
        z = z_c + k * (z_a - z_c) + sigma * noise_like(z_c, generator)
        prediction = self.latents.denoiser(z, torch.zeros_like(k.flatten()), sigma.flatten())
        error = (prediction - z_c) / sigma  # of the predicted noise: every level counts alike
        return error.square().mean(), self.latents.decode(prediction) if self.config.encoders else clean

    def save(self, folder: Path, average: Mapping[str, Tensor]) -> None:
        options = {"t": self.config.t, "steps": self.config.purify_steps}
        save_adapters(folder, _absolute(self.config.model), self.config.rank, dict(average), options)


def _absolute(model: str) -> str:
    """A folder by its whole path, so that the weights' folder can be used from anywhere."""
    return str(Path(model).expanduser().resolve()) if Path(model).expanduser().is_dir() else model


def train_backbone(
    config: BackboneConfig, folder: str | Path, kind: str, load: Callable[[torch.device], Tuner]
) -> Path:
    """Train in ``folder`` and return the folder with the weights, a purifier's; the same call resumes.

    ``load`` loads the model. Raises CodefendError when pairs or model are missing or wrong, or the folder was made with
    another config.
    """
    if not config.model:
        raise CodefendError("name a model of diffusers to fine-tune: --set model=ID_OR_FOLDER")
    folder = Path(folder)

    def build() -> Training[Batch]:
        bank, device = StreamedBank(config.pairs), default_device()
        tuner, encoders = load(device), [ViewedEncoder(name) for name in config.encoders]
        optimizer = torch.optim.AdamW(tuner.parameters.values(), lr=config.lr, betas=(0.9, 0.99))
        average = MovingAverage(nn.ParameterList(tuner.parameters.values()))

        def save(step: int) -> None:
            values = (parameter.detach() for parameter in average.module)
            tuner.save(folder / "weights", dict(zip(tuner.parameters, values, strict=True)))
            write_card(folder, kind)

        return Training(
            parameters=tuner.parameters,
            batch=partial(_batch, config, bank),
            loss=partial(_loss, config, tuner, encoders),
            optimizer=optimizer,
            schedule=cosine_schedule(optimizer, config.steps, warmup=config.warmup),
            average=average,
            steps=config.steps,
            save=save,
            save_every=config.save_every,
            micro=config.micro,
        )

    return fit(folder, {"train": kind, **asdict(config)}, build) / "weights"


def _batch(config: BackboneConfig, bank: StreamedBank, number: int) -> Batch:
    """Clean and adversarial images of a micro-batch, the first few of the latter left clean."""
    clean, attacked = bank.draw(np.random.default_rng([config.seed, 11, number]), config.batch)
    untouched = round(config.clean * config.batch)
    return clean, torch.cat([clean[:untouched], attacked[untouched:]])


def _loss(config: BackboneConfig, tuner: Tuner, encoders: Sequence[ViewedEncoder], batch: Batch, number: int) -> Losses:
    clean, attacked = (side.to(default_device()) for side in batch)
    loss, purified = tuner.loss(clean, attacked, make_generator(config.seed, "backbone", number))
    if not encoders:
        return {"pairs": loss}
    encoder = encoders[number % len(encoders)]
    with torch.no_grad():
        features = encoder.features(clean)
    closeness = F.cosine_similarity(encoder.features(purified.clamp(0, 1)), features, dim=-1)
    return {"pairs": loss, "features": config.w_features * (1 - closeness).mean()}
