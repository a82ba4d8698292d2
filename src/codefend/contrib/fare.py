"""FARE: fine-tune a pocket's image encoder adversarially, without labels (Schlarmann et al. 2024, arXiv 2402.12336).

TeCoA (Mao et al. 2023, arXiv 2212.07016) has another loss, `tecoa_loss`.

The loss is max over |d| <= eps of ||phi(x + d) - phi_orig(x)||^2: on an adversarial image the encoder must have the
features that the original encoder has on the clean one. Connector and language model stay unchanged.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from codefend import encoders
from codefend.attacks.objectives import word_loss
from codefend.core.assets import asset
from codefend.core.devices import default_device
from codefend.core.seeds import make_generator
from codefend.encoders.base import Encoder
from codefend.tasks.training_images import draw_training_images
from codefend.training.card import write_card
from codefend.training.fit import Losses, Training, cosine_schedule, fit
from codefend.training.frozen import WORDS
from codefend.training.mining import sign_steps
from codefend.training.pocket import export_parameters
from codefend.types import CodefendError, Objective
from codefend.victims.pocket import Pocket, load_unmerged, read_encoder

UNUSED = ("head.", "fc.")  # of the encoder: its ImageNet classifier, which no token passes


@dataclass(frozen=True)
class FareConfig:
    """Settings of the encoder's training. The paper: PGD-10, step 1/255, AdamW, lr 1e-5 for a ViT-L."""

    kind: ClassVar[str] = "fare"

    victim: str = "pocket"  # whose encoder: the shipped pocket, or a folder of pocket weights
    eps: float = 4 / 255
    mining_steps: int = 10
    mining_step: float = 1 / 255
    seed: int = 0
    steps: int = 300
    batch: int = 16
    lr: float = 1e-4
    weight_decay: float = 1e-4
    warmup: int = 20
    save_every: int = 25  # steps

    def train(self, folder: str | Path) -> Path:
        """Train in ``folder`` and return the folder with the weights, a pocket's; the same call resumes.

        Raises CodefendError when the victim is no pocket, or the folder was made with another config.
        """
        base, state = _read_pocket(self.victim)
        recorded = {"train": self.kind, "encoder": base["encoder"], **asdict(self)}

        def build() -> Training[Tensor]:
            device = default_device()
            original, encoder = (_load_encoder(base["encoder"], state, self.victim).to(device) for _ in range(2))
            parameters = {name: p for name, p in encoder.named_parameters() if not name.startswith(UNUSED)}
            loss = self.loss(encoder, original)
            optimizer = torch.optim.AdamW(parameters.values(), lr=self.lr, weight_decay=self.weight_decay)

            def save(step: int) -> None:
                tuned = {f"encoder.{name}": value for name, value in parameters.items()}
                export_parameters(Path(folder) / "weights", {**state, **tuned}, base)
                write_card(folder, self.kind)

            return Training(
                parameters=parameters,
                batch=partial(_images, self),
                loss=lambda clean, step: loss(clean.to(device), step),
                optimizer=optimizer,
                schedule=cosine_schedule(optimizer, self.steps, warmup=self.warmup),
                steps=self.steps,
                save=save,
                save_every=self.save_every,
            )

        return fit(folder, recorded, build) / "weights"

    def loss(self, encoder: Encoder, original: Encoder) -> Callable[[Tensor, int], Losses]:
        """The loss of a clean batch at a step."""
        return lambda clean, step: fare_loss(self, encoder, original, clean, step)


def fare_loss(config: FareConfig, encoder: Encoder, original: Encoder, clean: Tensor, step: int) -> Losses:
    """ "loss" on adversarial images, and its value on the clean ones, "clean": how far the encoder has drifted.

    Squared distance of the vision tokens, in units of the original ones' squared length: a constant factor.
    """
    with torch.no_grad():
        target = original(clean)
    scale = target.square().sum(-1).mean()

    def distance(images: Tensor) -> Tensor:
        error: Tensor = encoder(images) - target
        squared: Tensor = error.square().sum(-1).mean(1) / scale
        return squared

    return adversarial_loss(config, encoder, distance, clean, step)


def adversarial_loss(config: FareConfig, encoder: Encoder, distance: Objective, clean: Tensor, step: int) -> Losses:
    """ "loss": the mean of ``distance`` near its maximum in the ball; "clean": of the clean images."""
    encoder.requires_grad_(False)
    attacked = sign_steps(
        lambda images: -distance(images),
        clean,
        eps=config.eps,
        steps=config.mining_steps,
        rel_step=config.mining_step / config.eps,
        generator=make_generator(config.seed, "fare", step),
    )
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_(not name.startswith(UNUSED))
    with torch.no_grad():
        drift = distance(clean).mean().item()
    return {"loss": distance(attacked).mean(), "clean": drift}


def _images(config: FareConfig, step: int) -> Tensor:
    rng = np.random.default_rng([config.seed, 11, step])
    return draw_training_images(rng, config.batch, first_scene=4_000_000 + step * config.batch)


def pocket_folder(name: str) -> Path:
    """Where the weights of the pocket ``name`` lie."""
    return asset("weights/pocket") if name == "pocket" else Path(name)


def _read_pocket(name: str) -> tuple[dict[str, object], dict[str, Tensor]]:
    """A pocket's config and trained tensors, as its folder has them. Raises CodefendError when there is none."""
    folder = pocket_folder(name)
    try:
        config = json.loads((folder / "config.json").read_text())
        state = load_file(folder / "model.safetensors")
        words = [str(word) for word in config.get("vocabulary", ())]
        return {"encoder": str(config["encoder"]), "rank": int(config["rank"]), "vocabulary": words}, state
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise CodefendError(
            f"{name} is no folder of pocket weights ({error}); FARE fine-tunes a pocket's encoder"
        ) from error


def _load_encoder(name: object, state: dict[str, Tensor], folder: str) -> Encoder:
    encoder = encoders.load(str(name))
    read_encoder(encoder, state, Path(folder))
    return encoder


@dataclass(frozen=True)
class TecoaConfig(FareConfig):
    """TeCoA's: FARE's, with another loss."""

    kind: ClassVar[str] = "tecoa"

    def loss(self, encoder: Encoder, original: Encoder) -> Callable[[Tensor, int], Losses]:
        """The loss of a clean batch at a step."""
        pocket = load_unmerged(pocket_folder(self.victim)).to(default_device())
        return lambda clean, step: tecoa_loss(self, pocket, encoder, original, clean, step)


def tecoa_loss(
    config: FareConfig, pocket: Pocket, encoder: Encoder, original: Encoder, clean: Tensor, step: int
) -> Losses:
    """The cross-entropy of the vision tokens' words, "loss" on adversarial images and "clean" on the clean ones.

    TeCoA's is that between an adversarial image and the text of its class. A pocket reads a word in every vision token:
    the labels are those that the original encoder gives on the clean image, and the words are the language model's own.
    """
    table = F.normalize(torch.stack([embedding.mean(0) for embedding in pocket.embed(WORDS)]), dim=-1)

    def scores(phi: Encoder, images: Tensor) -> Tensor:
        return F.normalize(pocket.connector.words(phi(images)), dim=-1) @ table.T

    with torch.no_grad():
        labels = scores(original, clean).argmax(-1)
    return adversarial_loss(config, encoder, lambda images: word_loss(scores(encoder, images), labels), clean, step)
