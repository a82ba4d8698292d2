"""Fine-tune diffusion models of others on pairs: pixel models as bridges, Stable Diffusion with LoRA in latents.

Both descend to the clean picture from a point on the way from it to the attacked one: x = x_c + k (x_a - x_c) +
k sigma n, k in (0, 1], where shift and noise shrink together along the walk that purification takes (`diffusion.
bridge_purify`, `diffusion.denoise_from` with eta 0). In latents, with sigma the level of time t, that is the directed
denoising of CoDefend-R and ADBM (arXiv 2408.00315): the noise to predict is n + (x_a - x_c) / sigma.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from codefend.contrib.backbones.latent import add_adapters, load_latents, save_adapters
from codefend.contrib.backbones.pixels import load_denoiser, save_denoiser
from codefend.contrib.backbones.vp import VPDenoiser
from codefend.core.devices import default_device, mixed_precision
from codefend.core.runs import Run, check_run, make_generator
from codefend.purifiers.diffusion import bridge_predict, charbonnier, noise_like, sample_bridge_times
from codefend.training.banks import StreamedBank
from codefend.training.card import write_card
from codefend.training.feed import feed
from codefend.training.pairs import Tower
from codefend.training.parallel import Workers
from codefend.training.state import Average, cosine_rate, restore_training, save_training, set_rate
from codefend.types import CodefendError


@dataclass(frozen=True)
class TuneConfig:
    """What both have in common."""

    model: str = ""  # a diffusers model, id or folder
    pairs: tuple[str, ...] = ()  # bank folders made by `codefend pairs`, Parquet ones too; streamed
    encoders: tuple[str, ...] = ()  # guide by their features, one a micro-batch in turn; none: no guidance
    w_features: float = 1.0
    clean: float = 0.15  # share of pictures left clean
    seed: int = 0
    steps: int = 1200
    batch: int = 8
    micro: int = 1  # batches a step, shared out by the processes of `accelerate launch`, else one after another
    lr: float = 1e-4
    warmup: int = 50
    save_every: int = 50  # steps


@dataclass(frozen=True)
class HFBridgeConfig(TuneConfig):
    """Every weight of a pixel model is trained; moments and average take three times its memory again."""

    noise: float = 0.0  # in the attacked picture, pixels in [0, 1]


@dataclass(frozen=True)
class LatentConfig(TuneConfig):
    """Adapters on every attention; the rest stays as it is."""

    rank: int = 16
    t: float = 0.15  # share of the model's steps that the attacked latent is noised to
    purify_steps: int = 4  # of the purifier that is saved; does not matter for training


class Tuner(Protocol):
    """One kind of model: what is trained, its loss on a micro-batch, and how its weights are written."""

    parameters: dict[str, nn.Parameter]

    def loss(self, clean: Tensor, attacked: Tensor, draw: Generator) -> tuple[Tensor, Tensor]:
        """The loss, a scalar, and the purified pictures ``[B,3,H,W]``."""
        ...

    def save(self, folder: Path, average: dict[str, Tensor]) -> None: ...


class PixelTuner:
    """A pixel model as a bridge; the same loss as `training.bridge`'s first term."""

    def __init__(self, config: HFBridgeConfig, device: torch.device) -> None:
        self.config, self.net = config, load_denoiser(config.model).to(device)
        self.net.model.requires_grad_(True)
        self.parameters = {name: p for name, p in self.net.model.named_parameters() if p.requires_grad}

    def loss(self, clean: Tensor, attacked: Tensor, draw: Generator) -> tuple[Tensor, Tensor]:
        s = sample_bridge_times(len(clean), at_one=0.6, generator=draw).to(clean)
        seen = bridge_predict(self.net, clean, attacked, s, self.config.noise, generator=draw)
        return 8.0 * charbonnier(seen, clean).mean(), seen

    def save(self, folder: Path, average: dict[str, Tensor]) -> None:
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

    def loss(self, clean: Tensor, attacked: Tensor, draw: Generator) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            right, wrong = self.latents.encode(clean), self.latents.encode(attacked)
        k = sample_bridge_times(len(clean), generator=draw).clamp_min(1e-2).to(clean).view(-1, 1, 1, 1)
        sigma = k * self.sigma
        x = right + k * (wrong - right) + sigma * noise_like(right, draw)
        found = self.latents.denoiser(x, torch.zeros_like(k.flatten()), sigma.flatten())
        error = (found - right) / sigma  # of the predicted noise: every level counts alike
        return error.square().mean(), self.latents.decode(found) if self.config.encoders else clean

    def save(self, folder: Path, average: dict[str, Tensor]) -> None:
        options = {"t": self.config.t, "steps": self.config.purify_steps}
        save_adapters(folder, _absolute(self.config.model), self.config.rank, average, options)


def _absolute(model: str) -> str:
    """A folder by its whole path, so that the weights' folder can be used from anywhere."""
    return str(Path(model).expanduser().resolve()) if Path(model).expanduser().is_dir() else model


def train_backbone(config: TuneConfig, folder: str | Path) -> Path:
    """Train in ``folder`` and return the folder with the weights, a purifier's; the same call resumes.

    Raises CodefendError when pairs or model are missing or wrong, or the folder was made with another config.
    """
    if not config.model:
        raise CodefendError("name a model of diffusers to fine-tune: --set model=ID_OR_FOLDER")
    kind, make = KINDS[type(config)]
    described = {"train": kind, **asdict(config)}
    check_run(folder, described)
    workers = Workers.join(config.micro)
    bank, device = StreamedBank(config.pairs), default_device()
    tuner, towers = make(config, device), [Tower(name) for name in config.encoders]
    run = workers.open_run(folder, described)  # a misspelt name has left nothing behind
    parameters = tuner.parameters
    optimizer = torch.optim.AdamW([{"params": list(parameters.values()), "base": config.lr}], betas=(0.9, 0.99))
    average, checkpoint = Average(parameters), run.dir / "checkpoint.safetensors"
    step = restore_training(checkpoint, parameters, optimizer, average)
    with workers.progress(kind, config.steps, done=step) as advance:
        for batches in feed(partial(workers.share, partial(_draw, config, bank)), step, config.steps, device):
            started = time.perf_counter()
            set_rate(optimizer, cosine_rate(step, config.steps, warmup=config.warmup))
            optimizer.zero_grad()
            found = [_descend(config, tuner, towers, *images, number) for number, images in batches]
            workers.sum_gradients(list(parameters.values()))
            terms = workers.mean_terms(found)
            norm = torch.nn.utils.clip_grad_norm_(list(parameters.values()), 1.0)
            optimizer.step()
            average.update(parameters)
            step += 1
            row = {"grad_norm": float(norm), "seconds": time.perf_counter() - started}
            run.append({"key": f"step-{step}", "step": step, **terms, **row})
            advance(1, f"loss {sum(terms.values()):.3f}")
            if isinstance(run, Run) and (step % config.save_every == 0 or step == config.steps):
                tuner.save(run.dir / "weights", average.values)
                write_card(run, kind)
                save_training(checkpoint, parameters, optimizer, step, average)  # last: then the weights are there
    return run.dir / "weights"


def _draw(config: TuneConfig, bank: StreamedBank, number: int) -> tuple[Tensor, Tensor]:
    """Micro-batch ``number``: clean and attacked, the first few of the latter left clean."""
    clean, attacked = bank.draw(np.random.default_rng([config.seed, 11, number]), config.batch)
    untouched = round(config.clean * config.batch)
    return clean, torch.cat([clean[:untouched], attacked[untouched:]])


def _descend(
    config: TuneConfig, tuner: Tuner, towers: list[Tower], clean: Tensor, attacked: Tensor, number: int
) -> dict[str, Tensor]:
    """Add the gradients of micro-batch ``number``; its weighted terms."""
    device, draw = default_device(), make_generator(config.seed, "backbone", number)
    with mixed_precision(device):
        loss, seen = tuner.loss(clean.to(device), attacked.to(device), draw)
        terms = {"pairs": loss}
        if towers:
            tower = towers[number % len(towers)]
            with torch.no_grad():
                right = tower.features(clean.to(device))
            closeness = F.cosine_similarity(tower.features(seen.clamp(0, 1)), right, dim=-1)
            terms["features"] = config.w_features * (1 - closeness).mean()
    (torch.stack(list(terms.values())).sum() / config.micro).backward()
    return terms


KINDS: dict[type, tuple[str, Callable[[Any, torch.device], Tuner]]] = {
    HFBridgeConfig: ("hf-bridge", PixelTuner),
    LatentConfig: ("latent", LatentTuner),
}
