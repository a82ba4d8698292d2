"""Train the pocket victim: ground the connector's tokens in words, then tune the language model on instructions.

Stage 1 (minutes) needs no language model: cross-entropy over cosines brings each vision token near the embedding of the
words for its cell ("red car", "background"). Stage 2 is visual instruction tuning (Liu et al. 2023) of connector and
LoRA on captions and questions. An image and all its texts are one sequence under a block mask, in which each text
attends to the image and itself: several times the supervision per image.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codefend.core import images
from codefend.core.checkpoints import save_checkpoint
from codefend.core.devices import default_device
from codefend.core.files import write_atomic
from codefend.core.progress import progress
from codefend.encoders.views import SIDE, fit_square
from codefend.tasks.easyvqa import load_easyvqa
from codefend.tasks.language import MIX, training_texts
from codefend.tasks.readers import LazyExamples
from codefend.tasks.scenes import PLACES, Scene, compose, load_photographs
from codefend.training.card import write_card
from codefend.training.fit import Log, Losses, Training, cosine_schedule, fit, optimize
from codefend.training.frozen import WORDS
from codefend.victims.pocket import AFTER, BEFORE, END, Pocket, read_trained

Dialogues = tuple[Path, list[tuple[str, str]]]  # an image file with its (question, answer) pairs
Instructions = tuple[Tensor, list[list[tuple[str, str]]]]  # images [B, 3, H, W], the (prompt, answer) pairs of each
Encode = Callable[[Sequence[str]], list[list[int]]]  # texts to token ids, without special tokens


@dataclass(frozen=True)
class PocketConfig:
    """Settings of the pocket's training."""

    encoder: str = "lite0"  # lite0, lite1 or lite2: a different victim each
    rank: int = 32  # of the LoRA adapters
    init: str = ""  # weights folder to start from, of the same encoder and rank; empty: from scratch
    seed: int = 0
    grounding_scenes: int = 6000
    grounding_shapes: int = 2000  # images of easy-vqa's training split
    grounding_epochs: int = 10  # 0: no grounding, stage 2 starts from the connector of ``init``
    lr_grounding: float = 2e-3
    steps: int = 900
    batch: int = 4  # images a step
    questions: int = 5  # texts an image, besides its caption
    mix: tuple[str, ...] = MIX  # kinds of a scene's questions
    easyvqa: float = 0.3  # share of images from easy-vqa's training split
    lr_connector: float = 1e-3
    lr_lora: float = 8e-4
    warmup: int = 50
    save_every: int = 50  # steps

    def train(self, folder: str | Path) -> Path:
        """Train in ``folder`` and return the folder with the weights; the same call resumes after any interruption.

        Raises CodefendError when a weight package or scikit-image is missing, or for a folder made with another config.
        """
        return fit(folder, {"train": "pocket", **self.__dict__}, lambda: _training(self, Path(folder))) / "weights"


def _training(config: PocketConfig, folder: Path) -> Training[Instructions]:
    torch.manual_seed(config.seed)  # the initial weights only
    pocket = Pocket(config.encoder, rank=config.rank, vocabulary=WORDS)
    if config.init:
        read_trained(pocket, Path(config.init))
    pocket.to(default_device())
    shapes = load_shapes()
    optimizer = _optimizer(pocket.trainable, config)

    def loss(batch: Instructions, step: int) -> Losses:
        mean, answers, captions = packed_loss(pocket, *batch)
        return {"loss": mean, "answers": answers, "captions": captions}

    def save(step: int) -> None:
        export_parameters(folder / "weights", pocket.trainable, pocket.config)
        write_card(folder, "pocket")

    return Training(
        parameters=pocket.trainable,
        batch=partial(instruction_batch, config, shapes),
        loss=loss,
        optimizer=optimizer,
        schedule=cosine_schedule(optimizer, config.steps, warmup=config.warmup),
        steps=config.steps,
        save=save,
        save_every=config.save_every,
        prepare=partial(_ground, pocket, config, shapes) if config.grounding_epochs else None,
    )


def export_parameters(folder: Path, parameters: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write the weights of a victim in 16 bits, and its config, as `victims` reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: p.detach().to(torch.float16) for name, p in parameters.items()}
    save_checkpoint(folder / "model.safetensors", state)
    write_atomic(folder / "config.json", json.dumps(config, indent=2) + "\n")


# --- stage 1: words for cells ----------------------------------------------------------------------------------------


def _ground(pocket: Pocket, config: PocketConfig, shapes: Sequence[Dialogues], log: Log) -> None:
    """Train the connector alone, so that each token is near the words for its cell; log a row every hundred steps."""
    tokens, labels, words = _grounding_set(pocket, config, shapes)
    connector = pocket.connector.requires_grad_(True).train()
    if not config.init:
        connector.place.data.copy_(_places(pocket))
    steps = config.grounding_epochs * len(tokens) // 64
    generator = torch.Generator().manual_seed(config.seed)
    picks = [torch.randint(len(tokens), (64,), generator=generator) for _ in range(steps)]
    optimizer = torch.optim.AdamW(connector.parameters(), lr=config.lr_grounding, weight_decay=0.01)

    def loss(pick: Tensor, step: int) -> Losses:
        with torch.autocast(pocket.device.type, enabled=False):
            embedded = connector.words(tokens[pick].to(pocket.device).float())
            return cell_losses("loss", embedded, words, labels[pick].to(pocket.device))

    training = Training(
        parameters=dict(connector.named_parameters()),
        batch=picks.__getitem__,
        loss=loss,
        optimizer=optimizer,
        schedule=torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr_grounding, total_steps=steps),
        steps=steps,
        clip=None,
    )
    with progress("grounding", steps) as advance:
        for step, row in optimize(training):
            advance(1, f"loss {row['loss']:.3f}")
            if (step - 1) % 100 == 0 or step == steps:
                log({"key": f"ground-{step - 1}", **{name: row[name] for name in ("loss", "cells", "objects")}})


def _places(pocket: Pocket) -> Tensor:
    """Initial position embeddings ``[T, D]``: half of the embedding of the words for each token's corner."""
    corners = {corner: pocket.embed([f" {corner}"])[0].mean(0) for corner in PLACES}
    side = SIDE // 32
    names = [PLACES[2 * (row >= side // 2) + (column >= side // 2)] for row in range(side) for column in range(side)]
    return 0.5 * torch.stack([corners[name] for name in names])


def cell_losses(name: str, embedded: Tensor, words: Tensor, labels: Tensor) -> Losses:
    """Cross-entropy over the phrases for each cell, as ``name``, and the shares of cells and objects that are correct.

    ``embedded`` ``[B, T, D]``; ``words`` ``[C, D]``: unit embeddings of the phrases, the background last; ``labels``
    ``[B, T]``, -1 where a cell counts for nothing.
    """
    cosines = F.normalize(embedded, dim=-1) @ words.T
    nll = F.cross_entropy((cosines / 0.05).flatten(0, 1), labels.flatten(), ignore_index=-1)
    correct, labelled = cosines.argmax(-1) == labels, labels >= 0
    shares = {"cells": labelled, "objects": labelled & (labels < len(words) - 1)}
    return {name: nll, **{key: (correct & part).sum().item() / max(1, int(part.sum())) for key, part in shares.items()}}


def _grounding_set(pocket: Pocket, config: PocketConfig, shapes: Sequence[Dialogues]) -> tuple[Tensor, Tensor, Tensor]:
    """Encoder tokens ``[S, T, W]`` (half precision), cell labels ``[S, T]``, unit word embeddings ``[C, D]``."""
    named = [(path, name) for path, dialogues in shapes if (name := shape_name(dialogues))][: config.grounding_shapes]
    index, words = cell_vocabulary(pocket, [name for _, name in named])
    rng = np.random.default_rng([config.seed, 1])
    tokens, labels = [], []
    with progress("grounding scenes", config.grounding_scenes) as advance, torch.no_grad():
        for start in range(0, config.grounding_scenes, 32):
            # Numbers above a million: none of the instruction stage's scenes.
            scenes = [compose("train", 1_000_000 + start + i, photographs=load_photographs()) for i in range(32)]
            batch = augment(torch.stack([s.image for s in scenes]), rng)
            tokens.append(pocket.features(batch).half())
            labels.append(torch.stack([cell_labels(scene, index) for scene in scenes]))
            advance(32)
        for start in range(0, len(named), 32):
            part = named[start : start + 32]
            batch = torch.stack([fit_square(images.load(path).pixels[None])[0] for path, _ in part])
            tokens.append(pocket.features(augment(batch, rng)).half())
            cells = [shape_labels(p, index[n], index[" background"]) for p, (_, n) in zip(batch, part, strict=True)]
            labels.append(torch.stack(cells))
    return torch.cat(tokens), torch.cat(labels), words


def cell_vocabulary(pocket: Pocket, shapes: Sequence[str]) -> tuple[dict[str, int], Tensor]:
    """The phrases for a cell with their indices, and their unit embeddings ``[C, D]``.

    These are the objects of scenes, ``shapes`` (those of easy-vqa) and, last, the background.
    """
    names = [*WORDS, *sorted(set(shapes)), " background"]
    words = F.normalize(torch.stack([e.mean(0) for e in pocket.embed(names)]), dim=-1)
    return {name: i for i, name in enumerate(names)}, words


def cell_labels(scene: Scene, index: Mapping[str, int]) -> Tensor:
    """The label of each 32-pixel cell, ``[T]``; -1 where an object covers only a little of it."""
    side = SIDE // 32
    labels = torch.full((side, side), len(index) - 1)
    for item in scene.objects:
        for row in range(side):
            for column in range(side):
                high = min(item.top + item.size, 32 * row + 32) - max(item.top, 32 * row)
                wide = min(item.left + item.size, 32 * column + 32) - max(item.left, 32 * column)
                cover = max(0, high) * max(0, wide) / 32**2
                if cover > 0.3:
                    labels[row, column] = index[f" {item.phrase}"]
                elif cover > 0.05:
                    labels[row, column] = -1
    return labels.flatten()


def shape_name(dialogues: Sequence[tuple[str, str]]) -> str:
    """ " teal triangle", from the answers to the questions on an easy-vqa image; "" where they lack either word."""
    shapes, colours = ("circle", "rectangle", "triangle"), ("black", "blue", "brown", "gray", "green", "red", "teal")
    answers = {answer for _, answer in dialogues}
    colour, shape = (" ".join(sorted(answers & set(group))) for group in ((*colours, "yellow"), shapes))
    return f" {colour} {shape}" if colour and shape else ""


def shape_labels(image: Tensor, label: int, background: int) -> Tensor:
    """As `cell_labels` for an easy-vqa image ``[3, S, S]``: the shape is what differs from its flat background."""
    flat = image.flatten(1).median(1).values[:, None, None]
    inside = ((image - flat).abs().amax(0) > 0.12).float()
    cover = F.avg_pool2d(inside[None, None], 32)[0, 0].flatten()
    labels = torch.full(cover.shape, -1)
    labels[cover > 0.3] = label
    labels[cover < 0.02] = background
    return labels


def augment(batch: Tensor, rng: np.random.Generator) -> Tensor:
    """Light blur and noise on about half of the images ``[B, 3, SIDE, SIDE]``, as of images in use."""
    augmented = []
    for image in batch:
        if rng.random() < 0.35:
            small = int(rng.integers(72, SIDE))
            image = F.interpolate(image[None], (small, small), mode="bilinear", antialias=True)
            image = F.interpolate(image, (SIDE, SIDE), mode="bicubic").squeeze(0)
        if rng.random() < 0.35:
            noise = torch.from_numpy(rng.standard_normal((3, SIDE, SIDE), dtype=np.float32))
            image = image + noise * float(rng.uniform(0, 0.09))
        augmented.append(image.clamp(0, 1))
    return torch.stack(augmented)


# --- stage 2: instructions -------------------------------------------------------------------------------------------


def load_shapes() -> list[Dialogues]:
    """The images of easy-vqa's training split, each with all its (question, answer) pairs."""
    grouped: dict[Path, list[tuple[str, str]]] = {}
    examples = load_easyvqa("train").examples
    for record in cast(LazyExamples, examples).records:
        grouped.setdefault(record.path, []).append((record.prompt, record.references[0]))
    return list(grouped.items())


def instruction_batch(config: PocketConfig, shapes: Sequence[Dialogues], step: int) -> Instructions:
    """The images and texts of a step, a pure function of it."""
    rng = np.random.default_rng([config.seed, 2, step])
    batch, texts = [], []
    for i in range(config.batch):
        if rng.random() < config.easyvqa:
            path, dialogues = shapes[int(rng.integers(len(shapes)))]
            # Questions and answers are short here: twice as many cost as much as a scene's.
            picks = rng.choice(len(dialogues), min(2 * config.questions, len(dialogues)), replace=False)
            batch.append(fit_square(images.load(path).pixels[None])[0])
            texts.append([dialogues[int(p)] for p in picks])
        else:
            number = config.seed * 100_000 + step * config.batch + i
            scene = compose("train", number, photographs=load_photographs())
            batch.append(scene.image)
            texts.append(training_texts(scene, rng, questions=config.questions, mix=config.mix))
    return augment(torch.stack(batch), rng), texts


def packed_loss(
    pocket: Pocket, batch: Tensor, texts: Sequence[Sequence[tuple[str, str]]]
) -> tuple[Tensor, float, float]:
    """`text_loss` of images ``[B, 3, H, W]`` in the pocket's own layout."""
    vision = pocket.connector(pocket.features(batch.to(pocket.device)))
    before = pocket.embed([BEFORE])[0].expand(len(vision), -1, -1)
    return text_loss(pocket.llm, pocket.encode, torch.cat([before, vision], dim=1), texts)


def text_loss(
    llm: Any, encode: Encode, prefixes: Tensor, texts: Sequence[Sequence[tuple[str, str]]]
) -> tuple[Tensor, float, float]:
    """Mean NLL over all answers of all images, each with the same weight; and its values on answers and captions.

    ``llm`` is a LlamaForCausalLM and ``encode`` its tokenizer. ``prefixes`` ``[B, P, D]``: the embeddings of each
    sequence up to the end of the image; ``texts[b]`` the (prompt, answer) pairs of image b, of which the first is the
    caption.
    """
    device = prefixes.device
    rows = [_pack(encode, pairs, prefixes.shape[1]) for pairs in texts]
    table = llm.get_input_embeddings().weight
    embedded = [
        torch.cat([prefix, F.embedding(torch.tensor(row.ids, device=device), table)])
        for row, prefix in zip(rows, prefixes, strict=True)
    ]
    segments, positions = (
        [torch.tensor(part, device=device) for part in parts]
        for parts in zip(*((row.segments, row.positions) for row in rows), strict=True)
    )
    hidden = llm.model(
        inputs_embeds=nn.utils.rnn.pad_sequence(embedded, batch_first=True),
        attention_mask=_block_mask(nn.utils.rnn.pad_sequence(segments, batch_first=True, padding_value=-1)),
        position_ids=nn.utils.rnn.pad_sequence(positions, batch_first=True),
    ).last_hidden_state
    states = [hidden[b, at : at + len(reply)] for b, row in enumerate(rows) for at, reply in row.replies]
    replies = [reply for row in rows for _, reply in row.replies]
    targets = torch.tensor([i for reply in replies for i in reply], device=device)
    nll = F.cross_entropy(llm.lm_head(torch.cat(states)), targets, reduction="none")
    means = torch.stack([part.mean() for part in nll.split([len(reply) for reply in replies])])
    captions = torch.tensor([i == 0 for row in rows for i in range(len(row.replies))])
    return means.mean(), means[~captions].mean().item(), means[captions].mean().item()


class _Row(NamedTuple):
    """The texts of an image in one sequence, after a prefix with the image's tokens."""

    ids: list[int]  # without the prefix
    segments: list[int]  # of the whole sequence: 0 for the prefix, then each text's number
    positions: list[int]  # of the whole sequence: every text continues from the prefix
    replies: list[tuple[int, list[int]]]  # index of the first state that predicts a reply, and its ids


def _pack(encode: Encode, pairs: Sequence[tuple[str, str]], prefix: int) -> _Row:
    """``pairs`` are (prompt, answer); ``prefix``: its number of tokens."""
    row = _Row([], [0] * prefix, list(range(prefix)), [])
    prompts = encode([f"\n{prompt}{AFTER}" for prompt, _ in pairs])
    answers = encode([f"{answer}{END}" for _, answer in pairs])
    for number, (prompt, reply) in enumerate(zip(prompts, answers, strict=True), start=1):
        row.replies.append((prefix + len(row.ids) + len(prompt) - 1, reply))
        row.ids.extend(prompt + reply[:-1])
        length = len(prompt) + len(reply) - 1
        row.segments.extend([number] * length)
        row.positions.extend(range(prefix, prefix + length))
    return row


def _block_mask(segments: Tensor) -> Tensor:
    """Additive mask ``[B, 1, L, L]``: causal, and a text attends to segment 0 (the image) and its own segment only."""
    same = segments[:, :, None] == segments[:, None, :]
    shared = segments[:, None, :] == 0
    length = segments.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    allowed = (same | shared) & causal
    mask = torch.zeros(allowed.shape, device=segments.device)
    return mask.masked_fill(~allowed, torch.finfo(torch.float32).min)[:, None]


def _optimizer(parameters: Mapping[str, nn.Parameter], config: PocketConfig) -> torch.optim.Optimizer:
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    connector = [p for name, p in parameters.items() if name.startswith("connector.")]
    lora = [p for name, p in parameters.items() if "lora_" in name]
    groups = [
        {"params": connector, "lr": config.lr_connector, "weight_decay": 0.01},
        {"params": lora, "lr": config.lr_lora, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98))
