"""Train the pocket's tokens for photographs (`victims.photographs`): a gate, then tokens that carry class names.

The gate is a logistic regression that tells photographs and dead leaves from scenes. The tokens are learned with a
frozen language model from sampled class probabilities, so no photograph of any class is needed: prefix tuning (Li &
Liang 2021, arXiv 2101.00190) around words that are given.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from codefend.core import images as files
from codefend.core.assets import asset, needs
from codefend.core.checkpoints import save_checkpoint
from codefend.core.files import write_atomic
from codefend.encoders import SURE, class_names
from codefend.encoders.views import SIDE, fit_square
from codefend.tasks.language import BRIEF, CAPTION_PROMPTS, PREFIXES
from codefend.tasks.natural_images import NaturalConfig, NaturalImages
from codefend.tasks.photographs import EXISTENCE, OBJECT, UNSURE, caption, with_article
from codefend.tasks.scenes import compose, load_photographs
from codefend.training.card import write_card
from codefend.training.fit import Losses, Training, cosine_schedule, fit
from codefend.training.pocket import load_shapes, text_loss
from codefend.victims.photographs import TOKENS, PhotographTokens, build
from codefend.victims.pocket import BEFORE, Pocket, load_pocket

NAME = "pocket-photographs"
FIRST_SCENE = 80_000_000  # no scene of the other trainings and of the banks
OPENING = "\nThis is a photo. It shows"  # the first frame tokens start as its words
BAND = 0.5  # logits over which the gate opens


@dataclass(frozen=True)
class PhotographConfig:
    """The settings that determine the weights."""

    victim: str = ""  # folder of pocket weights; empty: the shipped ones
    natural: NaturalConfig = field(default_factory=lambda: NaturalConfig(shares=(0.7, 0.3, 0.0)))
    seed: int = 0
    scenes: int = 1200  # images of the gate's data set, of each kind
    strength: float = 1e-2  # inverse of the gate's regularization
    words: float = 5.0  # weight of the connector's words among what the gate reads
    steps: int = 150
    batch: int = 4  # class mixtures a step
    lr: float = 1e-2
    warmup: int = 10
    save_every: int = 10  # steps

    def train(self, folder: str | Path) -> Path:
        """As `train_photographs`."""
        return train_photographs(self, folder)


def train_photographs(config: PhotographConfig, folder: str | Path) -> Path:
    """Train in ``folder`` and return the folder with the weights; the same call resumes.

    Raises CodefendError when weights or a package are missing, or the folder was made with another config.
    """
    recorded = {"train": NAME, **asdict(config)}
    return fit(folder, recorded, lambda: _training(config, Path(folder))) / "weights"


def _training(config: PhotographConfig, folder: Path) -> Training[Batch]:
    pocket = load_pocket(Path(config.victim) if config.victim else asset("weights/pocket"))
    module = build(pocket.encoder, pocket.vocabulary, pocket.embed).to(pocket.device)
    _initialize(module, pocket)
    parameters = {name: p for name, p in module.named_parameters() if not name.startswith("gate.")}
    optimizer = torch.optim.Adam(parameters.values(), lr=config.lr)

    def loss(batch: Batch, step: int) -> Losses:
        return photograph_loss(pocket, module, batch)

    def save(step: int) -> None:
        if not module.gate.weight.any():
            fit_gate(config, pocket, module)
        state = {name: value.detach().half() for name, value in module.state_dict().items()}
        save_checkpoint(folder / "weights" / "model.safetensors", state)
        write_atomic(folder / "weights" / "config.json", json.dumps({"kind": NAME}, indent=2) + "\n")
        write_card(folder, NAME)

    return Training(
        parameters=parameters,
        batch=partial(sample_batch, config),
        loss=loss,
        optimizer=optimizer,
        schedule=cosine_schedule(optimizer, config.steps, warmup=config.warmup),
        steps=config.steps,
        save=save,
        save_every=config.save_every,
    )


def _initialize(module: PhotographTokens, pocket: Pocket) -> None:
    opening, sure, unsure, newline = pocket.embed([OPENING, " a", " something", "\n"])
    with torch.no_grad():
        module.frame.copy_(newline.expand_as(module.frame))
        module.frame[-len(opening) :] = opening[: len(module.frame)]
        module.confidence.copy_(torch.cat([unsure[:1], sure[:1]]))


# --- class names -----------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """Class probabilities ``[B, C]``, and (prompt, answer) pairs for each, the caption first."""

    probabilities: Tensor
    texts: list[list[tuple[str, str]]]


def sample_batch(config: PhotographConfig, step: int) -> Batch:
    """The batch of a step, a pure function of its number."""
    rng = np.random.default_rng([config.seed, 7, step])
    rows = [sample_probabilities(rng) for _ in range(config.batch)]
    return Batch(torch.stack(rows), [photograph_texts(row, rng) for row in rows])


def sample_probabilities(rng: np.random.Generator, *, gap: float = 0.05) -> Tensor:
    """``[C]``: one class with a share of 0.1 to 1, not near SURE, and the rest spread over few or many others."""
    top = rng.uniform(SURE + gap, 1) if rng.random() < 0.75 else rng.uniform(0.1, SURE - gap)
    others = rng.dirichlet(np.full(1000, float(rng.choice([0.003, 0.03]))))
    first = int(rng.integers(1000))
    others[first] = 0
    others = np.minimum(others * (1 - top) / max(others.sum(), 1e-9), 0.9 * top)
    row = torch.from_numpy(others).float()
    row[first] = top
    return row / row.sum()


def photograph_texts(probabilities: Tensor, rng: np.random.Generator) -> list[tuple[str, str]]:
    """A caption and questions of a photograph with these class probabilities ``[C]``."""
    share, first = probabilities.max(0)
    name = class_names()[int(first)] if share > SURE else ""
    texts = [(str(rng.choice(CAPTION_PROMPTS)), caption(name)), (_question(OBJECT, rng), name or UNSURE)]
    if name:
        other = class_names()[int(rng.integers(1000))]
        asked = [name, other] if rng.random() < 0.5 else [other, name]
        texts += [(_question(EXISTENCE.format(with_article(a)), rng), "yes" if a == name else "no") for a in asked]
    return [(f"{rng.choice(PREFIXES)}\n{p}" if rng.random() < 0.2 else p, t) for p, t in texts]


def _question(text: str, rng: np.random.Generator) -> str:
    words = ("photo", "photo", "picture", "image")
    return text.replace("photo", str(rng.choice(words))) + str(rng.choice(BRIEF))


def photograph_loss(pocket: Pocket, module: PhotographTokens, batch: Batch) -> Losses:
    """Mean NLL over the answers to all texts; its values on answers and captions."""
    tokens = module.tokens(batch.probabilities.to(pocket.device))
    before = pocket.embed([BEFORE])[0].expand(len(tokens), -1, -1)
    mean, answers, captions = text_loss(pocket.llm, pocket.encode, torch.cat([before, tokens], dim=1), batch.texts)
    return {"loss": mean, "answers": answers, "captions": captions}


# --- the gate --------------------------------------------------------------------------------------------------------


def fit_gate(config: PhotographConfig, pocket: Pocket, module: PhotographTokens) -> None:
    """Fit the gate's weights: no scene of a second set opens it, and BAND above the largest of these it is open.

    Raises CodefendError when scikit-learn is missing.
    """
    with needs("this training", "train"):
        from sklearn.linear_model import LogisticRegression
    scenes = _statistics(pocket, module, _scenes(range(config.scenes)) + _shapes(config.scenes // 4))
    natural = NaturalImages(config.natural, first_scene=FIRST_SCENE)
    rng = np.random.default_rng([config.seed, 8])
    drawn = [natural.draw(rng, 16, SIDE, number=i) for i in range(config.scenes // 16)]
    photographs = _statistics(pocket, module, [image for batch in drawn for image in batch])
    rows = torch.cat([scenes, photographs])
    mean, std = rows.mean(0), rows.std(0) + 1e-6
    std[-TOKENS:] /= config.words
    labels = np.repeat([0, 1], [len(scenes), len(photographs)])
    regression = LogisticRegression(C=config.strength, class_weight="balanced", max_iter=1000)
    regression.fit(((rows - mean) / std).numpy(), labels)
    weight = torch.from_numpy(regression.coef_[0]).float() / std
    held = _statistics(pocket, module, _scenes(range(config.scenes, 2 * config.scenes))) @ weight
    with torch.no_grad():
        module.gate.weight.copy_(weight / BAND)
        module.gate.bias.copy_(-held.max() / BAND)


def _scenes(numbers: Sequence[int]) -> list[Tensor]:
    return [compose("train", FIRST_SCENE + i, photographs=load_photographs()).image for i in numbers]


def _shapes(count: int) -> list[Tensor]:
    return [fit_square(files.load(path).pixels[None])[0] for path, _ in load_shapes()[:count]]


def _statistics(pocket: Pocket, module: PhotographTokens, images: Sequence[Tensor]) -> Tensor:
    parts = []
    with torch.no_grad():
        for i in range(0, len(images), 32):
            tokens = pocket.features(torch.stack(list(images[i : i + 32])).to(pocket.device))
            parts.append(module.gate.statistics(tokens, pocket.connector.words(tokens)).cpu())
    return torch.cat(parts)
