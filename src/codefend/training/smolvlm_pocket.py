"""Train the victim of `victims.smolvlm_pocket`: first its vision tower, then tower and adapters.

Stage 1 distils the frozen pocket, and no language model runs: the ViT learns the pocket's image tokens, which lie among
SmolLM2's word embeddings, the features of its encoder, and the words for each cell. Stage 2 is visual instruction
tuning (Liu et al. 2023) on captions and questions; it starts from the pocket's LoRA adapters.

Shape legend: B batch, S pixels (128), T image tokens (16), W the teacher's features, D the language model's width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codefend.core.assets import asset
from codefend.core.checkpoints import load_checkpoint, save_checkpoint
from codefend.core.devices import default_device
from codefend.core.images import load as load_image
from codefend.core.progress import progress
from codefend.encoders.views import fit_square
from codefend.tasks.language import MIX
from codefend.tasks.scenes import compose, load_photographs
from codefend.training.card import write_card
from codefend.training.fit import Log, Losses, Training, cosine_schedule, decay_groups, fit, optimize, restore_training
from codefend.training.pocket import (
    Instructions,
    PocketConfig,
    augment,
    cell_labels,
    cell_losses,
    cell_vocabulary,
    export_parameters,
    instruction_batch,
    load_shapes,
    shape_labels,
    shape_name,
    text_loss,
)
from codefend.types import CodefendError
from codefend.victims.pocket import BEFORE, Pocket, load_unmerged
from codefend.victims.smolvlm_pocket import (
    ADAPTERS,
    MEAN,
    NAME,
    PATCH,
    SIDE,
    SPECIAL,
    STD,
    VISION,
    VisionTower,
    architecture,
    read_weights,
)

Shapes = Sequence[tuple[Path, str]]  # image files of easy-vqa and the names of their shapes
FIRST_SCENE = 10_000_000  # number of the first scene of stage 1; no other training has scenes from here on
DECAY = 0.05  # of the weights of the vision tower
INSTRUCTION_SEED = 50  # added to the seed: stage 2 has other scenes than the pocket's training


@dataclass(frozen=True)
class SmolVLMConfig:
    """The settings that determine the weights."""

    teacher: str = ""  # folder of pocket weights; empty: the shipped ones
    init: str = ""  # folder of this victim's weights, from which stage 2 goes on; empty: stage 1 first
    seed: int = 0
    scenes: int = 6000  # in the data set of stage 1
    shapes: int = 1500  # images of easy-vqa's training split in it
    distill_steps: int = 2800  # stage 1
    distill_batch: int = 16
    lr_distill: float = 1.5e-3
    mosaic: float = 0.7  # share of images that are put together from quadrants of several scenes
    w_tokens: float = 1.0  # weight of the distance to the teacher's tokens; that of the words is 1
    w_features: float = 2.0  # weight of the distance to the features of the teacher's encoder
    steps: int = 30  # stage 2
    batch: int = 4  # images a step
    questions: int = 5  # texts an image, besides its caption
    mix: tuple[str, ...] = MIX  # kinds of a scene's questions
    easyvqa: float = 0.2  # share of images from easy-vqa's training split
    lr_vision: float = 1e-4
    lr_lora: float = 3e-4
    warmup: int = 5
    save_every: int = 10  # steps

    def train(self, folder: str | Path) -> Path:
        """Train both stages in ``folder``, or the second alone, and return the folder with the weights.

        The same call resumes either stage. Raises CodefendError when a weight package or scikit-image is missing, or
        for a folder made with another config.
        """
        return fit(folder, {"train": NAME, **self.__dict__}, lambda: _training(self, Path(folder))) / "weights"


def _training(config: SmolVLMConfig, folder: Path) -> Training[Instructions]:
    pocket = load_unmerged(Path(config.teacher) if config.teacher else asset("weights/pocket")).to(default_device())
    shapes = load_shapes()
    torch.manual_seed(config.seed)  # the initial weights only
    model = TrainableSmolVLM(VisionTower(architecture(pocket.llm.config)).to(pocket.device), pocket)
    if config.init:
        _initialize(model, Path(config.init))
    optimizer = _optimizer(model.trainable, config)
    named = [(path, name) for path, dialogues in shapes if (name := shape_name(dialogues))]
    scenes = PocketConfig(
        seed=config.seed + INSTRUCTION_SEED,
        batch=config.batch,
        questions=config.questions,
        mix=config.mix,
        easyvqa=config.easyvqa,
    )

    def save(step: int) -> None:
        export_parameters(folder / "weights", model.trainable, {"kind": NAME, "vision": VISION})
        write_card(folder, NAME)

    return Training(
        parameters=model.trainable,
        batch=partial(instruction_batch, scenes, shapes),
        loss=lambda batch, step: instruction_loss(model, batch),
        optimizer=optimizer,
        schedule=cosine_schedule(optimizer, config.steps, warmup=config.warmup),
        steps=config.steps,
        save=save,
        save_every=config.save_every,
        prepare=None if config.init else partial(_distill, config, folder, model.tower, pocket, named),
    )


# --- stage 1: data ---------------------------------------------------------------------------------------------------


class DistillationData(NamedTuple):
    """N images, scenes before easy-vqa's shapes, with the teacher's features and each cell's label."""

    images: Tensor  # [N, 3, S, S] uint8
    features: Tensor  # [N, T, W] half precision, of the teacher's encoder
    labels: Tensor  # [N, T] indices of phrases, -1 where unclear
    occupied: Tensor  # [M, 2] scene and quadrant, for the quadrants that show an object


class DistillationBatch(NamedTuple):
    """Augmented images, and the teacher's features and cells' labels of the images without augmentation."""

    images: Tensor  # [B, 3, S, S]
    features: Tensor  # [B, T, W]
    labels: Tensor  # [B, T]


def load_data(
    config: SmolVLMConfig, pocket: Pocket, index: Mapping[str, int], shapes: Shapes, path: Path
) -> DistillationData:
    """The data set in the file ``path``, which is drawn on first use."""
    if not path.exists():
        columns = zip(*_draw(config, pocket, index, shapes[: config.shapes]), strict=True)
        names = ("images", "features", "labels")
        save_checkpoint(path, {name: torch.cat(parts) for name, parts in zip(names, columns, strict=True)})
    tensors, _ = load_checkpoint(path)
    cells = tensors["labels"][: config.scenes].view(-1, 2, 2, 2, 2).transpose(2, 3).flatten(3).flatten(1, 2)
    occupied = ((cells >= 0) & (cells < len(index) - 1)).any(-1).nonzero()
    return DistillationData(tensors["images"], tensors["features"], tensors["labels"], occupied)


def _draw(
    config: SmolVLMConfig, pocket: Pocket, index: Mapping[str, int], shapes: Shapes
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Images (uint8), the teacher's features and cells' labels, at most 32 images at a time."""
    scenes = (_draw_scenes(range(i, min(i + 32, config.scenes)), index) for i in range(0, config.scenes, 32))
    others = (_read_shapes(shapes[i : i + 32], index) for i in range(0, len(shapes), 32))
    with progress("distillation images", config.scenes + len(shapes)) as advance:
        for images, labels in chain(scenes, others):
            levels = (images * 255).round().byte()
            with torch.no_grad():
                features = pocket.features(levels.float() / 255).half().cpu()
            yield levels, features, labels
            advance(len(levels))


def _draw_scenes(numbers: Sequence[int], index: Mapping[str, int]) -> tuple[Tensor, Tensor]:
    scenes = [compose("train", FIRST_SCENE + number, photographs=load_photographs()) for number in numbers]
    return torch.stack([scene.image for scene in scenes]), torch.stack([cell_labels(scene, index) for scene in scenes])


def _read_shapes(shapes: Shapes, index: Mapping[str, int]) -> tuple[Tensor, Tensor]:
    images = torch.stack([fit_square(load_image(path).pixels[None])[0] for path, _ in shapes])
    pairs = zip(images, shapes, strict=True)
    return images, torch.stack([shape_labels(image, index[name], index[" background"]) for image, (_, name) in pairs])


def distillation_batch(config: SmolVLMConfig, data: DistillationData, step: int) -> DistillationBatch:
    """The batch of a step, a pure function of it. A share ``mosaic`` of the images has quadrants of several scenes."""
    rng = np.random.default_rng([config.seed, 5, step])
    picks = torch.from_numpy(rng.integers(len(data.images), size=config.distill_batch))
    clean = data.images[picks].float() / 255
    features, labels = data.features[picks].float(), data.labels[picks].clone()
    side = round(labels.shape[1] ** 0.5)
    for i in np.flatnonzero(rng.random(config.distill_batch) < config.mosaic):
        for quadrant in range(4):
            scene, source = (int(v) for v in data.occupied[int(rng.integers(len(data.occupied)))])
            if rng.random() < 0.15:
                source = int(rng.integers(4))  # most of these show the background only
            clean[i][_window(quadrant, SIDE)] = data.images[scene][_window(source, SIDE)].float() / 255
            pairs = ((features[i].T, data.features[scene].float().T), (labels[i][None], data.labels[scene][None]))
            for target, origin in pairs:  # channels, then rows and columns of cells
                cells = origin.reshape(-1, side, side)[_window(source, side)]
                target.view(-1, side, side)[_window(quadrant, side)] = cells
    return DistillationBatch(augment(clean, rng), features, labels)


def _window(quadrant: int, side: int) -> tuple[Any, ...]:
    y, x, half = quadrant // 2, quadrant % 2, side // 2
    return (..., slice(y * half, (y + 1) * half), slice(x * half, (x + 1) * half))


# --- stage 1: distillation -------------------------------------------------------------------------------------------


class TowerStudent(nn.Module):
    """The tower with a head for stage 1 alone, from merged patches to the features of the teacher's encoder."""

    def __init__(self, tower: VisionTower, width: int) -> None:
        super().__init__()
        self.tower = tower
        self.features = nn.Linear(tower.connector.modality_projection.proj.in_features, width)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Image tokens ``[B, T, D]`` and predicted features ``[B, T, W]``."""
        hidden = self.tower.vision_model((images - MEAN) / STD).last_hidden_state
        connector = self.tower.connector
        return connector(hidden), self.features(connector.pixel_shuffle(hidden, connector.scale_factor))


class FeatureStatistics(NamedTuple):
    """Mean and standard deviation of the teacher's features, ``[W]`` each."""

    mean: Tensor
    std: Tensor


def initialize(student: TowerStudent, data: DistillationData, seed: int) -> FeatureStatistics:
    """Set the patch embedding to whitened principal components and the positions to sines and cosines."""
    features = data.features[:512].float().flatten(0, 1)
    images = augment(data.images[:256].float() / 255, np.random.default_rng([seed, 6]))
    patches = F.unfold((images - MEAN) / STD, PATCH, stride=PATCH).transpose(1, 2).flatten(0, 1)
    centred = patches - patches.mean(0)
    values, directions = torch.linalg.eigh(centred.T @ centred / len(centred))
    embeddings = student.tower.vision_model.embeddings
    width = embeddings.patch_embedding.out_channels
    with torch.no_grad():
        top = 0.5 * (directions / (values.clamp(min=0) + 0.02 * values.mean()).sqrt()).T[-width:].flip(0)
        embeddings.patch_embedding.weight.copy_(top.view_as(embeddings.patch_embedding.weight))
        bias: Any = embeddings.patch_embedding.bias
        bias.copy_(-top @ patches.mean(0))
        embeddings.position_embedding.weight.copy_(0.5 * _sinusoids(SIDE // PATCH, width))
    return FeatureStatistics(features.mean(0), features.std(0))


def _sinusoids(side: int, width: int) -> Tensor:
    """Sines and cosines of both coordinates, ``[side * side, width]`` (Chen et al. 2021, MoCo v3)."""
    y, x = torch.meshgrid(torch.arange(side).float(), torch.arange(side).float(), indexing="ij")
    rates = 100.0 ** (-torch.arange(width // 4) / (width // 4))
    angles = [coordinate.flatten()[:, None] * rates for coordinate in (y, x)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)


def distillation_loss(
    student: TowerStudent,
    pocket: Pocket,
    words: Tensor,
    statistics: FeatureStatistics,
    batch: DistillationBatch,
    config: SmolVLMConfig,
) -> Losses:
    """Cross-entropy over the phrases for each cell, and squared distances to the teacher's tokens and features.

    ``words`` ``[C, D]``: unit embeddings of the phrases, the background last.
    """
    with torch.autocast(batch.images.device.type, enabled=False):
        with torch.no_grad():
            targets = pocket.connector(batch.features)
        tokens, predictions = student(batch.images)
        cells = cell_losses("words", tokens - pocket.connector.place, words, batch.labels)
        distance = ((tokens - targets).square().sum(-1) / targets.square().sum(-1)).mean()
        error = F.mse_loss(predictions, (batch.features - statistics.mean) / statistics.std)
    return {**cells, "tokens": config.w_tokens * distance, "features": config.w_features * error}


def _distill(config: SmolVLMConfig, folder: Path, tower: VisionTower, pocket: Pocket, shapes: Shapes, log: Log) -> None:
    """Train the tower; log a row every ten steps. Data and checkpoint are files of their own in the run folder."""
    index, words = cell_vocabulary(pocket, [name for _, name in shapes])
    data = load_data(config, pocket, index, shapes, folder / "distillation-data.safetensors")
    student = TowerStudent(tower, pocket.encoder.width).to(pocket.device)
    mean, std = initialize(student, data, config.seed)
    statistics = FeatureStatistics(mean.to(pocket.device), std.to(pocket.device))
    parameters = dict(student.named_parameters())
    optimizer = torch.optim.AdamW(decay_groups(parameters.values(), DECAY, lr=config.lr_distill), betas=(0.9, 0.98))

    def loss(batch: DistillationBatch, step: int) -> Losses:
        moved = DistillationBatch(*(tensor.to(pocket.device) for tensor in batch))
        return distillation_loss(student, pocket, words, statistics, moved, config)

    training = Training(
        parameters=parameters,
        batch=partial(distillation_batch, config, data),
        loss=loss,
        optimizer=optimizer,
        schedule=cosine_schedule(optimizer, config.distill_steps, warmup=100),
        steps=config.distill_steps,
        save_every=250,
    )
    checkpoint = folder / "distillation.safetensors"
    start, seconds = restore_training(checkpoint, training), 0.0
    with progress("distillation", config.distill_steps, done=start) as advance:
        for step, row in optimize(training, checkpoint, start=start):
            advance(1, f"loss {row['loss']:.3f} objects {row['objects']:.2f}")
            seconds += row["seconds"]
            if step % 10 == 0:
                log({"key": f"distill-{step}", "distill_step": step, **row, "seconds": seconds})
                seconds = 0.0


# --- stage 2: instructions -------------------------------------------------------------------------------------------


class TrainableSmolVLM(nn.Module):
    """Vision tower, embeddings of the special tokens, and the pocket's language model with its adapters."""

    def __init__(self, tower: VisionTower, pocket: Pocket) -> None:
        super().__init__()
        self.tower, self.pocket = tower, pocket
        newline = pocket.embed(["\n"])[0]
        # Half of it: input and output embeddings are tied, and a full copy would be as likely an output as a newline.
        self.special = nn.Parameter(0.5 * newline.expand(2, -1).clone())

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that a weights folder holds, by their names there."""
        named = dict(self.tower.named_parameters())
        named[SPECIAL] = self.special
        for name, parameter in self.pocket.llm.model.named_parameters():
            if "lora_" in name:
                layer, _, matrix = name.partition(".lora_")
                named[f"{ADAPTERS}{layer}.{matrix[0]}"] = parameter
        return named

    def prefixes(self, images: Tensor) -> Tensor:
        """Embeddings ``[B, P, D]`` up to the end of the image, in the order of chat template and processor."""
        tokens = self.tower(images)
        around, whole = (row.expand(len(tokens), 1, -1) for row in self.special)
        before = self.pocket.embed([BEFORE])[0].expand(len(tokens), -1, -1)
        return torch.cat([before, around, whole, tokens, around], dim=1)


def instruction_loss(model: TrainableSmolVLM, batch: Instructions) -> Losses:
    """Mean NLL over the answers to all texts of all images; its values on answers and captions."""
    images, texts = batch
    prefixes = model.prefixes(images.to(model.pocket.device))
    mean, answers, captions = text_loss(model.pocket.llm, model.pocket.encode, prefixes, texts)
    return {"loss": mean, "answers": answers, "captions": captions}


def _initialize(model: TrainableSmolVLM, folder: Path) -> None:
    _, state = read_weights(folder)
    parameters = model.trainable
    if {name: p.shape for name, p in parameters.items()} != {name: v.shape for name, v in state.items()}:
        raise CodefendError(
            f"the weights in {folder} have another architecture; start from {NAME} weights of this version"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[name])


def _optimizer(parameters: Mapping[str, nn.Parameter], config: SmolVLMConfig) -> torch.optim.Optimizer:
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    vision = [p for name, p in parameters.items() if not name.startswith(ADAPTERS)]
    adapters = [p for name, p in parameters.items() if name.startswith(ADAPTERS)]
    lora = {"params": adapters, "lr": config.lr_lora, "weight_decay": 0.0}
    return torch.optim.AdamW([*decay_groups(vision, DECAY, lr=config.lr_vision), lora], betas=(0.9, 0.98))
