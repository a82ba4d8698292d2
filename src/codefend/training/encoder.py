"""Distil a small encoder of another family from EfficientNet-Lite features (Romero et al. 2015, FitNets).

The student's map at stride 16 predicts the teacher's stage 5, and its 2x2 means predict stage 7, each through a linear
layer that is dropped afterwards. The images are drawn once and stored with the teacher's maps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codefend.core.checkpoints import cached_tensors
from codefend.core.devices import default_device
from codefend.core.progress import progress
from codefend.encoders.efficientnet_lite import EfficientNetLite
from codefend.encoders.families import FamilyConfig, FamilyEncoder, save_encoder
from codefend.tasks.natural_images import NaturalConfig, NaturalImages
from codefend.training.card import write_card
from codefend.training.fit import Losses, MovingAverage, Training, cosine_schedule, decay_groups, fit

FIRST_SCENE = 40_000_000  # no scene of the bridges or banks
CHUNK = 20  # images the teacher sees at a time
DECAY = 0.99  # of the moving average


@dataclass(frozen=True)
class EncoderConfig:
    """Settings of the training of an encoder."""

    family: str = "vit16"
    width: int = 0  # 0: the family's default, also for depth
    depth: int = 0
    teacher: str = "lite2"
    images: int = 6000
    side: int = 128  # pixels, a multiple of 32
    natural: NaturalConfig = field(default_factory=NaturalConfig)
    cache: str = ""  # file for the images with the teacher's maps, shared by several trainings; empty: none
    seed: int = 0
    steps: int = 1000
    batch: int = 16
    lr: float = 1e-3
    warmup: int = 50
    save_every: int = 50  # steps

    def train(self, folder: str | Path) -> Path:
        """Train in ``folder`` and return the folder with the weights; the same call resumes.

        Raises CodefendError for an unknown family, missing packages, or a folder made with another config.
        """
        FamilyConfig(self.family, self.width, self.depth)  # fail early
        recorded = {"train": "encoder", **self.__dict__, "natural": self.natural.__dict__}
        return fit(folder, recorded, lambda: _training(self, Path(folder))) / "weights"


class TeacherBatch(NamedTuple):
    """Images ``[B, 3, H, W]`` with the teacher's stage 5 and stage 7, standardized per channel."""

    images: Tensor
    middle: Tensor
    last: Tensor


class FamilyStudent(nn.Module):
    """An encoder with the two linear layers that predict the teacher's maps."""

    def __init__(self, encoder: FamilyEncoder, middle: int, last: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.middle, self.last = nn.Conv2d(encoder.width, middle, 1), nn.Conv2d(encoder.width, last, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        maps = self.encoder.maps(images)
        return self.middle(maps), self.last(F.avg_pool2d(maps, 2))


def _training(config: EncoderConfig, folder: Path) -> Training[TeacherBatch]:
    data = TeacherBatches(config)
    torch.manual_seed(config.seed)  # the initial weights only
    encoder = FamilyEncoder(FamilyConfig(config.family, config.width, config.depth))
    student = FamilyStudent(encoder, *data.channels).to(default_device()).train()
    average = MovingAverage(student, DECAY)
    optimizer = torch.optim.AdamW(decay_groups(student.parameters(), 0.03), lr=config.lr, betas=(0.9, 0.99))

    def loss(batch: TeacherBatch, number: int) -> Losses:
        return distillation_loss(student, TeacherBatch(*(tensor.to(default_device()) for tensor in batch)))

    def save(step: int) -> None:
        origin = {"teacher": config.teacher, "steps": config.steps, "seed": config.seed}
        save_encoder(folder / "weights", average.module.encoder, more=origin)
        write_card(folder, "encoder")

    return Training(
        parameters=dict(student.named_parameters()),
        batch=data,
        loss=loss,
        optimizer=optimizer,
        schedule=cosine_schedule(optimizer, config.steps, warmup=config.warmup),
        average=average,
        steps=config.steps,
        save=save,
        save_every=config.save_every,
    )


def distillation_loss(student: FamilyStudent, batch: TeacherBatch) -> dict[str, Tensor]:
    """For each of the two maps: 1 - mean cosine of its cells, plus a quarter of the mean squared error."""
    middle, last = student(batch.images)
    return {"middle": _map_loss(middle, batch.middle), "last": _map_loss(last, batch.last)}


def _map_loss(prediction: Tensor, target: Tensor) -> Tensor:
    return 1 - F.cosine_similarity(prediction, target, dim=1).mean() + 0.25 * F.mse_loss(prediction, target)


# --- batches ---------------------------------------------------------------------------------------------------------


class TeacherBatches:
    """The batch of each step, half of the time mirrored."""

    def __init__(self, config: EncoderConfig) -> None:
        self.config = config
        tensors = load_teacher_maps(config)
        self.images = tensors["images"]
        self.middle, self.last = StandardizedMaps(tensors["middle"]), StandardizedMaps(tensors["last"])

    @property
    def channels(self) -> tuple[int, int]:
        """Of the teacher's two maps."""
        return self.middle.maps.shape[1], self.last.maps.shape[1]

    def __call__(self, step: int) -> TeacherBatch:
        rng = np.random.default_rng([self.config.seed, 21, step])
        picks = torch.from_numpy(rng.integers(len(self.images), size=self.config.batch))
        images, middle, last = self.images[picks].float() / 255, self.middle[picks], self.last[picks]
        if rng.random() < 0.5:
            return TeacherBatch(images.flip(-1), middle.flip(-1), last.flip(-1))
        return TeacherBatch(images, middle, last)


class StandardizedMaps:
    """Maps ``[N, C, h, w]`` with zero mean and unit deviation per channel, by statistics of the first 1,000."""

    def __init__(self, maps: Tensor) -> None:
        self.maps = maps
        sample = maps[:1000].float()
        self.mean = sample.mean((0, 2, 3), keepdim=True)
        self.std = sample.std((0, 2, 3), keepdim=True).clamp_min(1e-3)

    def __getitem__(self, picks: Tensor) -> Tensor:
        return (self.maps[picks].float() - self.mean) / self.std


def load_teacher_maps(config: EncoderConfig) -> dict[str, Tensor]:
    """``images`` (8 bits), ``middle`` and ``last`` (float16), from the config's cache or drawn and written there."""
    state = {"teacher": config.teacher, "images": config.images, "side": config.side, "seed": config.natural.seed}
    state["shares"] = list(config.natural.shares)
    return cached_tensors(config.cache, state, lambda: _draw_teacher_maps(config))


@torch.no_grad()
def _draw_teacher_maps(config: EncoderConfig) -> dict[str, Tensor]:
    source = NaturalImages(config.natural, first_scene=FIRST_SCENE)
    teacher = EfficientNetLite(config.teacher).to(default_device())
    parts: dict[str, list[Tensor]] = {"images": [], "middle": [], "last": []}
    with progress("teacher", config.images) as advance:
        for number in range(-(-config.images // CHUNK)):
            rng = np.random.default_rng([config.natural.seed, 22, number])
            images = (source.draw(rng, CHUNK, config.side, number=number) * 255).round()
            middle, last = teacher.maps((images / 255).to(default_device()))
            parts["images"].append(images.to(torch.uint8))
            parts["middle"].append(middle.half().cpu().contiguous())
            parts["last"].append(last.half().cpu().contiguous())
            advance(CHUNK)
    return {name: torch.cat(tensors) for name, tensors in parts.items()}
