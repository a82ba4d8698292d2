"""Train the bridge: supervised diffusion from adversarial to clean images, guided by frozen encoders and the victim.

A step takes pairs (x_c, x_a) from a bank, or mines x_a by an attack through the current purifier with fresh noise, and
descends L = bridge + features + words + direction. Each term has a weight in `BridgeConfig`; zero turns it off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor

from codefend.attacks import objectives
from codefend.core.devices import default_device
from codefend.core.seeds import make_generator
from codefend.core.settings import recorded
from codefend.purifiers.bridge import bridge_state, charbonnier, sample_bridge_sigmas, sample_bridge_times
from codefend.purifiers.nets import NetConfig, PurifierNet
from codefend.tasks.language import training_texts
from codefend.tasks.scenes import compose, load_photographs
from codefend.tasks.training_images import draw_training_images, own_photographs
from codefend.training.banks import Bank, StreamedBank
from codefend.training.camera import jpeg_file
from codefend.training.fit import Losses, MovingAverage, Training, fit
from codefend.training.frozen import OWN, Text, answers_loss, answers_objective
from codefend.training.guides import Guide, directional_hinge, load_guide, token_distance, viewed
from codefend.training.mining import mine
from codefend.training.nets import grow, load_prior, net_training
from codefend.training.replay import Replays
from codefend.types import CodefendError, Objective


class Pairs(NamedTuple):
    """A micro-batch: clean images ``[B, 3, H, W]`` and their adversarial versions, None where these are to be mined."""

    clean: Tensor
    attacked: Tensor | None
    texts: Sequence[Text] = ()  # of each image, where the language model is attacked


@dataclass(frozen=True)
class BridgeConfig:
    """Settings of a training of a bridge on pairs."""

    pairs: tuple[str, ...] = ()  # bank folders made by `codefend pairs`, also as Parquet
    prior: str = ""  # a prior or bridge to fine-tune, weights folder or name; empty: the shipped prior; "none"
    victim: str = "pocket"  # a name or weights folder; a pocket guides by its word scores, others by their answers
    encoders: tuple[str, ...] = ("lite0", "lite2")  # guide by their features, in turn; "victim": the victim's own
    residual_bound: float | None = 64 / 255  # largest change of a pixel in one noise-free evaluation
    seed: int = 0
    steps: int = 1200
    batch: int = 16
    mined: float = 0.4  # share of steps whose pairs are mined through the purifier
    mining_steps: int = 2
    max_eps: float = 12 / 255  # of mined pairs
    clean: float = 0.15  # share of images that are not attacked
    max_sigma: float = 0.1  # pixels: noise in attacked images, drawn as in `sample_bridge_sigmas`
    gamma: float = 0.0  # noise of the bridge itself, pixels
    w_bridge: float = 8.0
    w_identity: float = 0.0  # added to w_bridge on clean images
    w_features: float = 1.0
    w_words: float = 0.3
    w_direction: float = 0.2
    lr: float = 8e-4
    warmup: int = 50
    save_every: int = 50  # steps
    # The fields from here on are recorded only where they differ from their defaults: older runs resume.
    stream: bool = False  # read shards on demand instead of holding all in memory
    micro: int = 1  # micro-batches a step, shared by the processes of `accelerate launch`
    without: tuple[str, ...] = ()  # attack kinds and target networks that banks and mining leave out
    noise_free: float = 0.5  # share of images, and of mined steps, without noise
    min_sigma: float = 0.0  # least noise of the others, pixels
    sigma: float = 0.0  # default noise of the trained purifier
    at_one: float = 0.6  # share of images at s = 1, where one evaluation starts
    eps_ramp: int = 0  # steps in which the budget of mining grows linearly from 1/255 to max_eps
    lean: bool = False  # mine by `sign_steps`: a third cheaper, and each image has its own eps
    mined_average: float = 0.0  # share of mined steps that attack the averaged network
    answers: float = 0.0  # share of mined steps that attack the language-model loss, on scenes
    answers_batch: int = 4  # images in such a step: the language model is expensive
    w_answers: float = 0.0  # in such a step: language-model loss of the true answers on the purified images
    photographs: str = ""  # a folder of your own photographs, for pairs mined in the loop
    # Steps on the same pairs, each harder than the one before (`replay.py`). `mined` is then the share of batches that
    # start at random instead of from a bank, nothing else is mined, and of mining's settings only `max_eps` counts.
    replay: int = 1
    replay_step: float = 0.5  # step of the perturbation, in units of each pair's radius
    channels: tuple[int, ...] = ()  # of a larger network, initialized from the prior's; empty: the prior's
    blocks: tuple[int, ...] = ()  # the same
    jpeg: float = 0.0  # share of a bank's pairs whose clean image is compressed first
    strength: float = 1.0  # default strength of the trained purifier
    views: float = 0.0  # share of steps guided by another view of the images (`encoders.views`)

    def __post_init__(self) -> None:
        if self.replay < 1 or self.save_every % self.replay:
            raise CodefendError(f"replay must divide save_every={self.save_every}, got {self.replay}")
        if self.replay > 1 and {"features", "words"} & set(self.without):
            raise CodefendError(
                "replayed pairs ascend the whole loss, features and words: set replay=1 to leave one out"
            )
        if not 0 < self.strength <= 1.5:
            raise CodefendError(f"strength must be above 0, to 1.5, got {self.strength:g}")
        if self.views and set(self.encoders) <= {OWN}:
            raise CodefendError("views need encoders by name, such as lite0: a victim of your own has one view")
        if self.mined and {"features", "words"} <= set(self.without):
            raise CodefendError("without=features,words leaves nothing to mine: keep one, or set mined=0")

    def recorded(self) -> dict[str, object]:
        """The fields for the run's config."""
        return recorded(self, later="stream")

    def train(self, folder: str | Path) -> Path:
        """Train in ``folder`` and return the folder with the weights; the same call resumes.

        Raises CodefendError when pairs, prior or victim are missing, or the folder was made with another config.
        """
        described = {"train": "bridge", **self.recorded()}
        return fit(folder, described, lambda: _training(self, Path(folder))) / "weights"


def _training(config: BridgeConfig, folder: Path) -> Training[Pairs]:
    bank = open_bank(config)
    own_photographs(config.photographs)  # fail early where the folder is missing
    guide = load_guide(config.victim, config.encoders)
    net = start_from_prior(config).to(default_device()).train()
    average = MovingAverage(net)
    options = {"sigma": config.sigma} if config.sigma else {}
    options |= {"strength": config.strength} if config.strength != 1 else {}
    return net_training(
        config,
        folder,
        "bridge",
        average,
        batch=partial(draw_pairs, config, bank),
        loss=BridgeLoss(config, net, average, guide, Replays(max_eps=config.max_eps, rel_step=config.replay_step)),
        options=options,
        micro=config.micro,
    )


def start_from_prior(config: BridgeConfig) -> PurifierNet:
    """The prior's weights in a network with the bridge's residual bound; the identity where the prior is "none"."""
    if config.prior == "none":
        torch.manual_seed(config.seed)  # the network's initial weights only
        net = PurifierNet(NetConfig(residual_bound=config.residual_bound))
    else:
        net = load_prior(config.prior, residual_bound=config.residual_bound)
    return grow(net, channels=config.channels, blocks=config.blocks, seed=config.seed)


# --- the loss --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BridgeLoss:
    """The loss of a micro-batch, on pairs of a bank or on pairs mined through ``net`` or its moving average."""

    config: BridgeConfig
    net: PurifierNet
    average: MovingAverage[PurifierNet]
    guide: Guide
    replays: Replays

    def __call__(self, batch: Pairs, number: int) -> Losses:
        """The weighted terms, each a scalar, and whether the pairs were mined."""
        generator = make_generator(self.config.seed, "bridge", number)
        x_c, x_a = self.pairs(batch, number, generator)
        return {**self.terms(x_c, x_a, number, generator, batch.texts), "mined": batch.attacked is None}

    def terms(
        self, x_c: Tensor, x_a: Tensor, number: int, generator: Generator, texts: Sequence[Text] = ()
    ) -> dict[str, Tensor]:
        """L = bridge + features + words + direction, from a random point x_s of the bridge between x_c and x_a."""
        c, n = self.config, len(x_c)
        s = sample_bridge_times(n, at_one=c.at_one, generator=generator).to(x_c)
        sigma = sample_bridge_sigmas(n, clean=c.noise_free, low=c.min_sigma, high=c.max_sigma, generator=generator)
        x_s, level = bridge_state(x_c, x_a, s, sigma.to(x_c), gamma=c.gamma, generator=generator)
        prediction = self.net(x_s, s, level)
        distance = charbonnier(prediction, x_c)
        terms = {"bridge": c.w_bridge * distance.mean()}
        if c.w_identity:
            terms["identity"] = c.w_identity * distance[: round(c.clean * n)].sum() / n
        x_0 = prediction.clamp(0, 1)
        if c.w_features or c.w_direction:
            encoder = viewed(self.guide.encoder(number), self._views_rng(number), share=c.views)
            with torch.no_grad():
                z_c, z_a = encoder.features(x_c), encoder.features(x_a)
            z_0 = encoder.features(x_0)
            terms["features"] = c.w_features * token_distance(z_0, z_c).mean()
            terms["direction"] = c.w_direction * directional_hinge(z_0, z_c, z_a).mean()
        if c.w_words:
            terms["words"] = c.w_words * self.guide.divergence(x_c, x_0).mean()
        if c.w_answers:  # zero without texts: every micro-batch has the same terms
            terms["answers"] = c.w_answers * answers_loss(self.guide.victim, x_0, texts)
        return terms

    def pairs(self, batch: Pairs, number: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """x_c and x_a of a micro-batch; x_a is mined where the batch has none. The first images stay clean."""
        c, device = self.config, default_device()
        x_c, x_a = batch.clean.to(device), None if batch.attacked is None else batch.attacked.to(device)
        clean = round(c.clean * len(x_c))
        if c.replay > 1:
            step, slot = divmod(number, c.micro)
            if step % c.replay == 0:
                self.replays.begin(slot, x_c, x_a, untouched=clean, generator=generator)
            return x_c, self.replays.attacked(slot)
        if x_a is None:
            x_a = torch.cat([x_c[:clean], self.mine(x_c[clean:], batch.texts[clean:], number, generator)])
        return x_c, torch.cat([x_c[:clean], x_a[clean:]])

    def mine(self, x_c: Tensor, texts: Sequence[Text], number: int, generator: Generator) -> Tensor:
        """Attack through the current purifier; noise, objective and budget are drawn for each micro-batch."""
        c, rng = self.config, np.random.default_rng([self.config.seed, 8, number])
        noisy = rng.random() < 1 - c.noise_free
        sigma = float(rng.uniform(c.min_sigma, c.max_sigma)) if noisy else 0.0
        objective = self._objective(x_c, texts, number, rng)
        ramp = min(1.0, (number + 1) / c.eps_ramp) if c.eps_ramp else 1.0
        eps = rng.uniform(1 / 255, 1 / 255 + ramp * (c.max_eps - 1 / 255), len(x_c) if c.lean else None)
        net = self.average.module if self._mines_average(number) else self.net
        return mine(net, objective, x_c, eps=eps, sigma=sigma, steps=c.mining_steps, lean=c.lean, generator=generator)

    def _objective(self, x_c: Tensor, texts: Sequence[Text], number: int, rng: np.random.Generator) -> Objective:
        """What mining lowers on purified images: features or words, evenly; the answers where there are texts."""
        without = self.config.without
        second = rng.random() < 0.5
        if texts:
            return answers_objective(self.guide.victim, texts, towards=not second)
        if "features" in without or (second and "words" not in without):
            return self.guide.objective(x_c)
        return objectives.features_away(self.guide.encoder(number), x_c)

    def _mines_average(self, number: int) -> bool:
        c = self.config
        return bool(c.mined_average) and np.random.default_rng([c.seed, 10, number]).random() < c.mined_average

    def _views_rng(self, number: int) -> np.random.Generator:
        """Of the view of a micro-batch. Replays of the same images keep theirs: a perturbation that ascends through a
        new view each time does not get anywhere."""
        return np.random.default_rng([self.config.seed, 11, first_of_replays(self.config, number)])


# --- batches ---------------------------------------------------------------------------------------------------------


def open_bank(config: BridgeConfig) -> Bank | StreamedBank:
    """The pairs of the config's folders. Raises CodefendError as the banks do, or for a streamed one `without`."""
    if config.stream and config.without:
        raise CodefendError("a streamed bank leaves nothing out: set stream=false or drop without")
    return StreamedBank(config.pairs) if config.stream else Bank(config.pairs, without=config.without)


def draw_pairs(config: BridgeConfig, bank: Bank | StreamedBank, number: int) -> Pairs:
    """The pairs of a micro-batch; replays have those of the first."""
    return _drawn(config, bank, first_of_replays(config, number))


def first_of_replays(config: BridgeConfig, number: int) -> int:
    """The number of the first micro-batch with the images of ``number``; itself without replay."""
    step, slot = divmod(number, config.micro)
    return step // config.replay * config.replay * config.micro + slot


@lru_cache(maxsize=8)  # replayed images are not composed again
def _drawn(config: BridgeConfig, bank: Bank | StreamedBank, number: int) -> Pairs:
    rng = np.random.default_rng([config.seed, 7, number])
    first = 3_000_000 + number * config.batch
    if rng.random() >= config.mined:
        return Pairs(*compress_clean(*bank.draw(rng, config.batch), rng, share=config.jpeg))
    if config.answers and rng.random() < config.answers:
        scenes = [compose("train", first + i, photographs=load_photographs()) for i in range(config.answers_batch)]
        choices = [training_texts(scene, rng) for scene in scenes]
        texts = [choice[int(rng.integers(len(choice)))] for choice in choices]
        return Pairs(torch.stack([scene.image for scene in scenes]), None, texts)
    own = own_photographs(config.photographs)
    return Pairs(draw_training_images(rng, config.batch, first_scene=first, own=own), None)


def compress_clean(clean: Tensor, attacked: Tensor, rng: np.random.Generator, *, share: float) -> tuple[Tensor, Tensor]:
    """A ``share`` of the pairs as if the clean image had been a JPEG file, under the same perturbation.

    Most photographs were: a network that has never seen JPEG artefacts takes them for an attack.
    """
    chosen = rng.random(len(clean)) < share if share else ()
    compressed, perturbation = clean.clone(), attacked - clean
    for index in np.flatnonzero(chosen):
        compressed[index] = jpeg_file(clean[index], rng)
    return compressed, (compressed + perturbation).clamp(0, 1)
