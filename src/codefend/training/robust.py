"""Train a bridge for any noise level: adversarial training in few steps through encoders of several families.

Each step draws images, a noise level for each, and an encoder. The images are attacked through the present purifier
in one step (`mining.n_fgsm`) or more (`mining.mine`), or in a few steps on the encoder alone, and the step descends
distance + identity + features + variation + words + answers. Little noise goes with oblivious attacks and more with
adaptive ones, so the noise level of the finished purifier is a dial between fidelity and adaptive robustness.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from codefend.attacks import objectives
from codefend.core.devices import default_device
from codefend.core.seeds import make_generator
from codefend.core.settings import recorded
from codefend.encoders.views import View, ViewedEncoder
from codefend.purifiers.bridge import bridge_state, charbonnier, sample_bridge_times
from codefend.purifiers.nets import PurifierNet, load_net
from codefend.tasks.language import training_texts
from codefend.tasks.natural_images import NaturalConfig, NaturalImages
from codefend.tasks.scenes import Scene, compose, load_photographs
from codefend.training.camera import jpeg_file
from codefend.training.damage import damage
from codefend.training.fit import Losses, MovingAverage, Training, fit, held_rate
from codefend.training.frozen import OWN, Text, answers_loss, answers_objective, word_objective
from codefend.training.guides import PocketGuide, load_guide, token_distance
from codefend.training.mining import mine, n_fgsm, sign_steps
from codefend.training.nets import grow, load_prior, net_training
from codefend.types import CodefendError, Objective

FIRST_SCENE = 60_000_000  # no scene of the other trainings and of the banks
SCALES = (0.75, 1.0, 1.25, 1.5)  # of the images' side, for views of the encoders
DECAY = 0.995  # of the moving average
TOWARDS = 0.3  # share of attacks on features that aim at another image's
WORDS_TOWARDS = 0.4  # the same of attacks on words

# Attacks of a step: through the purifier, on the language-model loss or on words or features (of scenes) or on
# features; on the encoder alone; none.
Threat = Literal["answers", "words", "adaptive", "oblivious", "damage"]
ON_SCENES: tuple[Threat, ...] = ("answers", "words")
ADAPTIVE: tuple[Threat, ...] = ("answers", "words", "adaptive")


@dataclass(frozen=True)
class RobustConfig:
    """Settings of a training of a bridge for any noise level."""

    prior: str = ""  # a prior or bridge to start from, weights folder or name; empty: the shipped prior
    channels: tuple[int, ...] = (32, 64, 128, 256)
    blocks: tuple[int, ...] = (1, 1, 2, 1)
    residual_bound: float | None = 64 / 255
    victim: str = "pocket"  # a pocket, whose word scores are attacked and guide
    encoders: tuple[str, ...] = ("lite0", "lite2")
    zoo: tuple[str, ...] = ()  # weights folders of encoders of other families, from `codefend train encoder`
    natural: NaturalConfig = field(default_factory=NaturalConfig)
    seed: int = 0
    steps: int = 360
    sides: tuple[int, ...] = (64, 96, 128)  # pixels of the images, one size per step
    batches: tuple[int, ...] = (16, 8, 4)  # images per step at each side
    shares: tuple[float, ...] = (0.4, 0.4, 0.2)  # of the steps at each side
    words: float = 0.15  # share of steps on scenes of 128 pixels, whose words are attacked and guide
    words_batch: int = 4
    bare: float = 0.8  # share of oblivious attacks among the other steps
    bare_steps: int = 4
    damage: float = 0.02  # share of the other steps with warps, fog and occlusion instead of attacks
    min_eps: float = 2 / 255
    max_eps: float = 12 / 255
    start: float = 1.0  # half-width of the uniform start of an adaptive perturbation, in units of eps
    clean: float = 0.2  # share of images left clean; the same images follow once more, attacked
    noise_free: float = 0.35  # share of images without noise, where attacks are oblivious
    low_sigma: tuple[float, float] = (0.01, 0.04)  # of the other images there, log-uniform
    high_sigma: tuple[float, float] = (0.04, 0.15)  # where attacks are adaptive, log-uniform
    at_one: float = 0.92  # share of images at s = 1, where one evaluation starts
    views: float = 0.4  # share of steps whose encoder has a view of another size
    same: float = 0.7  # share of steps guided by the attacked encoder
    jpeg: float = 0.15  # share of clean images that are compressed first
    w_distance: float = 8.0
    w_identity: float = 12.0  # added on clean images without noise
    w_features: float = 4.0
    w_words: float = 0.8
    w_variation: float = 1.0  # features of a clean image and of the same image attacked, both purified
    teacher: str = ""  # weights folder of a bridge whose outputs are targets where attacks are oblivious; empty: none
    taught: float = 0.8  # share of its output in these targets; the rest is the clean image
    lr: float = 2e-4
    warmup: int = 20
    decay: float = 0.4  # share of the steps, at the end, in which the rate falls to zero
    save_every: int = 50  # steps
    sigma: float = 0.02  # default noise of the trained purifier
    # The fields from here on are recorded only where they differ from their defaults: older runs resume.
    strength: float = 1.0  # its default strength
    answers: float = 0.0  # share of the steps on scenes that attack the language-model loss instead, which then guides
    w_answers: float = 0.4  # in such a step: language-model loss of the true answers on the purified images
    adaptive_steps: int = 1  # sign steps of an attack through the purifier; one is N-FGSM
    faithful_sigma: float = 0.0  # on scenes behind more noise the distance counts by this over sigma; 0: fully

    def __post_init__(self) -> None:
        if not len(self.sides) == len(self.batches) == len(self.shares):
            raise CodefendError("give sides, batches and shares one entry for each size of the images")
        if not (self.encoders or self.zoo) or OWN in self.encoders:
            raise CodefendError("name at least one encoder, in encoders or zoo, and none of the victim's")
        if not 0 < self.strength <= 1.5:
            raise CodefendError(f"strength must be above 0, to 1.5, got {self.strength:g}")
        for low, high in (self.low_sigma, self.high_sigma):
            if not 0 < low <= high:
                raise CodefendError(f"a range of noise levels must be above 0 and ordered, got {low:g} to {high:g}")

    def train(self, folder: str | Path) -> Path:
        """Train in ``folder`` and return the folder with the weights; the same call resumes.

        Raises CodefendError when weights, an encoder or the victim are missing, or for a folder of another config.
        """
        described = {"train": "robust", **recorded(self, later="strength")}
        return fit(folder, described, lambda: _training(self, Path(folder))) / "weights"


def _training(config: RobustConfig, folder: Path) -> Training[ThreatBatch]:
    guide = load_guide(config.victim, (*config.encoders, *config.zoo))
    if not isinstance(guide, PocketGuide):
        raise CodefendError(f"victim {config.victim!r} has no word scores, and this training needs them; use a pocket")
    teacher = load_net(config.teacher)[0].to(default_device()).requires_grad_(False) if config.teacher else None
    prior = load_prior(config.prior, residual_bound=config.residual_bound)
    net = grow(prior, channels=config.channels, blocks=config.blocks, seed=config.seed).to(default_device()).train()
    options = {"sigma": config.sigma} if config.sigma else {}
    options |= {"strength": config.strength} if config.strength != 1 else {}
    return net_training(
        config,
        folder,
        "bridge",
        MovingAverage(net, DECAY),
        batch=RobustBatches(config),
        loss=RobustLoss(config, net, guide, teacher),
        options=options,
        rate=partial(held_rate, steps=config.steps, warmup=config.warmup, decay=config.decay),
    )


# --- batches ---------------------------------------------------------------------------------------------------------


class ThreatBatch(NamedTuple):
    """Clean images ``[B, 3, H, W]`` and how they are to be attacked."""

    images: Tensor
    threat: Threat
    texts: Sequence[Text] = ()  # of each image, where the language model is attacked


class RobustBatches:
    """The images of each step, a function of its number alone."""

    def __init__(self, config: RobustConfig) -> None:
        self.config = config
        self.natural = NaturalImages(config.natural, first_scene=FIRST_SCENE)

    def __call__(self, number: int) -> ThreatBatch:
        c = self.config
        rng = np.random.default_rng([c.seed, 31, number])
        threat: Threat = "words"
        texts: list[Text] = []
        if rng.random() < c.words:
            first = 2 * FIRST_SCENE + number * c.words_batch
            scenes = [compose("train", first + i, photographs=load_photographs()) for i in range(c.words_batch)]
            images = torch.stack([scene.image for scene in scenes])
            if c.answers and rng.random() < c.answers:
                threat, texts = "answers", [draw_text(scene, rng) for scene in scenes]
        else:
            size = int(rng.choice(len(c.sides), p=np.asarray(c.shares) / sum(c.shares)))
            images = self.natural.draw(rng, c.batches[size], c.sides[size], number=number)
            threat = self._threat(rng.random())
        compressed = rng.random(len(images)) < c.jpeg
        images = torch.stack([jpeg_file(x, rng) if j else x for x, j in zip(images, compressed, strict=True)])
        clean = round(c.clean * len(images))
        images[clean : 2 * clean] = images[:clean]  # attacked copies of the clean images, for the variation term
        texts[clean : 2 * clean] = texts[:clean]
        return ThreatBatch(images, threat, texts)

    def _threat(self, draw: float) -> Threat:
        c = self.config
        if draw < c.damage:
            return "damage"
        return "oblivious" if draw < c.damage + (1 - c.damage) * c.bare else "adaptive"


def draw_text(scene: Scene, rng: np.random.Generator) -> Text:
    """A prompt about ``scene`` and the true answer: a caption or a question."""
    choices = training_texts(scene, rng)
    return choices[int(rng.integers(len(choices)))]


# --- the loss --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RobustLoss:
    """The loss of a batch: attack it, purify it, compare with the clean images or the teacher's outputs."""

    config: RobustConfig
    net: PurifierNet
    guide: PocketGuide
    teacher: PurifierNet | None = None

    def __call__(self, batch: ThreatBatch, number: int) -> Losses:
        """The weighted terms, each a scalar, and what kind of batch it was."""
        c, x_c = self.config, batch.images.to(default_device())
        rng = np.random.default_rng([c.seed, 32, number])
        generator = make_generator(c.seed, "robust", number)
        sigma = draw_sigmas(c, batch.threat, rng, len(x_c)).to(x_c)
        encoder, other = self._draw_encoder(rng, x_c), self._draw_encoder(rng, x_c)
        clean = round(c.clean * len(x_c))
        x_a = x_c.clone()
        x_a[clean:] = self._attack(
            x_c[clean:], batch.threat, batch.texts[clean:], encoder, sigma[clean:], rng, generator
        )
        s = sample_bridge_times(len(x_c), at_one=c.at_one, generator=generator).to(x_c)
        s[: 2 * clean] = 1
        x_s, level = bridge_state(x_c, x_a, s, sigma, generator=generator)
        prediction = self.net(x_s, s, level)
        guide = encoder if batch.threat in ON_SCENES or rng.random() < c.same else other
        target = x_c
        if self.teacher is not None and batch.threat == "oblivious":
            with torch.no_grad():
                output = self.teacher(x_s[clean:], s[clean:], level[clean:]).clamp(0, 1)
            target = torch.cat([x_c[:clean], torch.lerp(x_c[clean:], output, c.taught)])
        terms = self._terms(x_c, prediction, target, sigma, guide, words=batch.threat in ON_SCENES)
        if c.answers:  # zero without texts: every batch has the same terms
            terms["answers"] = c.w_answers * answers_loss(self.guide.victim, prediction.clamp(0, 1), batch.texts)
        adaptive = batch.threat in ADAPTIVE
        return {**terms, "adaptive": adaptive, "damage": batch.threat == "damage", "side": x_c.shape[-1]}

    def _terms(
        self, x_c: Tensor, prediction: Tensor, target: Tensor, sigma: Tensor, guide: ViewedEncoder, *, words: bool
    ) -> dict[str, Tensor]:
        c = self.config
        clean = round(c.clean * len(x_c))
        distance, noise_free = charbonnier(prediction, target), (sigma[:clean] == 0).to(x_c)
        lean = words and c.faithful_sigma
        faith = (c.faithful_sigma / sigma).clamp_max(1) if lean else torch.ones_like(sigma)
        x_0 = prediction.clamp(0, 1)
        with torch.no_grad():
            z_c = guide.features(x_c)
        z_0 = guide.features(x_0)
        variation = 1 - F.cosine_similarity(z_0[:clean], z_0[clean : 2 * clean], dim=-1)
        divergence = self.guide.divergence(x_c, x_0).mean() if words else prediction.new_zeros(())
        return {
            "distance": c.w_distance * (distance * faith).mean(),
            "identity": c.w_identity * (distance[:clean] * noise_free).sum() / len(x_c),
            "features": c.w_features * token_distance(z_0, z_c).mean(),
            "variation": c.w_variation * variation.sum() / (len(x_c) * z_0.shape[1]),
            "words": c.w_words * divergence,
        }

    def _draw_encoder(self, rng: np.random.Generator, images: Tensor) -> ViewedEncoder:
        """One of the encoders, on a view of the images' size or of another."""
        encoder = self.guide.encoders[int(rng.integers(len(self.guide.encoders)))]
        assert isinstance(encoder, ViewedEncoder)  # the config names none of the victim's
        side = images.shape[-1]
        if rng.random() < self.config.views:
            side = max(64, round(side * SCALES[int(rng.integers(len(SCALES)))] / 32) * 32)
        return encoder.through(View(side))

    def _attack(
        self,
        x_c: Tensor,
        threat: Threat,
        texts: Sequence[Text],
        encoder: ViewedEncoder,
        sigma: Tensor,
        rng: np.random.Generator,
        generator: Generator,
    ) -> Tensor:
        """``x_c`` attacked, each with its own eps."""
        c = self.config
        if threat == "damage":
            return damage(x_c, rng)
        eps = torch.from_numpy(rng.uniform(c.min_eps, c.max_eps, len(x_c))).to(x_c)
        if threat == "answers":
            objective = answers_objective(self.guide.victim, texts, towards=rng.random() < WORDS_TOWARDS)
        elif threat == "words" and rng.random() < 0.75:
            target = x_c.roll(1, 0) if rng.random() < WORDS_TOWARDS else None
            objective = word_objective(self.guide.victim, x_c, target)
        else:
            objective = _features_objective(encoder, x_c, towards=rng.random() < TOWARDS)
        if threat == "oblivious":
            rel_step = 1.5 / c.bare_steps
            return sign_steps(objective, x_c, eps=eps, steps=c.bare_steps, rel_step=rel_step, generator=generator)
        if c.adaptive_steps > 1:
            return mine(
                self.net, objective, x_c, eps=eps, sigma=sigma, steps=c.adaptive_steps, lean=True, generator=generator
            )
        return n_fgsm(self.net, objective, x_c, eps=eps, sigma=sigma, start=c.start, generator=generator)


def draw_sigmas(config: RobustConfig, threat: Threat, rng: np.random.Generator, count: int) -> Tensor:
    """A noise level per image ``[count]``: none or little, or more where the attack is adaptive."""
    adaptive = threat in ADAPTIVE
    low, high = np.log(config.high_sigma if adaptive else config.low_sigma)
    levels = np.exp(rng.uniform(low, high, count))
    return torch.from_numpy(levels if adaptive else levels * (rng.random(count) >= config.noise_free))


def _features_objective(encoder: ViewedEncoder, x_c: Tensor, *, towards: bool) -> Objective:
    """Away from the clean images' features, or towards those of the next image of the batch."""
    if towards:
        return objectives.features_towards(encoder, x_c.roll(1, 0))
    return objectives.features_away(encoder, x_c)
