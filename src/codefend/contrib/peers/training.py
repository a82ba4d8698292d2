"""Train a peer: another paper's purifier on our network, started from our prior, on our pictures and pairs.

One loop for all; what differs is the loss (`contrib.peers.losses`). ADBM makes its perturbations in the loop, the Gaussian
FlowPure needs none, the others take the static pairs of a bank. Steps and batch are the bridge's.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Generator, Tensor

from codefend import victims
from codefend.contrib.peers import losses as peers
from codefend.core.devices import default_device, mixed_precision
from codefend.core.runs import check_run, make_generator, open_run, progress
from codefend.purifiers.base import clip
from codefend.purifiers.diffusion import noise_like
from codefend.purifiers.nets import NetConfig, PurifierNet, load_net, save_net
from codefend.tasks.training_images import training_pictures
from codefend.training.bridge import HALF, Bank, averaged
from codefend.training.card import write_card
from codefend.training.feed import feed
from codefend.training.mining import sign_steps
from codefend.training.pairs import WORDS, Tower, word_objective
from codefend.training.state import Average, cosine_rate, descend, restore_training, save_training, set_rate
from codefend.types import CodefendError
from codefend.victims.pocket import Pocket

Method = Literal["hgd", "flowpure", "flowpure-gauss", "adbm", "codefend-r"]
USES: dict[Method, tuple[str, ...]] = {  # the settings that a method has, beside those that all have
    "hgd": ("pairs", "without", "clean", "encoders"),
    "flowpure": ("pairs", "without", "clean"),
    "flowpure-gauss": ("noise",),
    "adbm": ("victim", "eps", "mining_steps", "times"),
    "codefend-r": ("pairs", "without", "clean", "victim", "times", "w_alignment"),
}


@dataclass(frozen=True)
class PeerConfig:
    """Everything that decides a peer's weights. What a method has no use for (`USES`) is neither read nor recorded."""

    method: Method = "hgd"
    pairs: tuple[str, ...] = ()  # bank folders made by `codefend pairs`: hgd, flowpure, codefend-r
    without: tuple[str, ...] = ()  # kinds and target networks of the bank that are left out
    prior: str = ""  # weights folder to fine-tune from; empty: the shipped prior
    victim: str = "pocket"  # adbm, codefend-r: whose words guide
    encoders: tuple[str, ...] = ("lite0", "lite2")  # hgd: whose features guide, one a step in turn
    seed: int = 0
    steps: int = 1200
    batch: int = 16
    clean: float = 0.0  # share of pairs whose attacked picture is the clean one
    eps: float = 8 / 255  # adbm: of the perturbations made in the loop
    mining_steps: int = 3  # adbm: each as long as eps
    times: tuple[float, float] = (0.1, 0.2)  # adbm, codefend-r: VP times among which the bridge's far end is drawn
    noise: float = 0.3  # flowpure-gauss: at the flow's far end, pixels in [0, 1]
    w_alignment: float = 0.0  # codefend-r: vision tokens of the prediction with the words of the clean picture
    lr: float = 8e-4
    warmup: int = 50
    save_every: int = 50  # steps

    def uses(self, setting: str) -> bool:
        return setting in USES[self.method]

    def recorded(self) -> dict[str, object]:
        """What the run's config holds."""
        foreign = {name for names in USES.values() for name in names} - set(USES[self.method])
        return {name: value for name, value in asdict(self).items() if name not in foreign}


@dataclass(frozen=True)
class Frozen:
    """The networks that some losses look through."""

    towers: tuple[Tower, ...] = ()
    pocket: Pocket | None = None

    @classmethod
    def load(cls, config: PeerConfig) -> Frozen:
        """What ``config.method`` needs. Raises CodefendError for a victim that is no pocket."""
        if config.uses("encoders"):
            return cls(towers=tuple(Tower(name) for name in config.encoders))
        if not config.uses("victim"):
            return cls()
        victim = victims.load(config.victim)
        if not isinstance(victim, Pocket):
            raise CodefendError(f"{config.method} is guided by a pocket victim, not {victim.name}")
        return cls(pocket=victim)


def train_peer(config: PeerConfig, folder: str | Path) -> Path:
    """Train in ``folder`` and return the folder with the weights; the same call resumes.

    Raises CodefendError when pairs, prior or victim are missing, or the folder was made with another config.
    """
    described = {"train": "peer", **config.recorded()}
    check_run(folder, described)
    bank = Bank(config.pairs, without=config.without) if config.uses("pairs") else None
    frozen, device = Frozen.load(config), default_device()
    net = start(config).to(device).train()
    run = open_run(folder, described)  # a misspelt name has left nothing behind
    optimizer = torch.optim.AdamW([{"params": list(net.parameters()), "base": config.lr}], betas=(0.9, 0.99))
    parameters = dict(net.named_parameters())
    average, checkpoint = Average(parameters), run.dir / "checkpoint.safetensors"
    step = restore_training(checkpoint, parameters, optimizer, average)
    with progress(config.method, config.steps, done=step) as advance:
        for clean, attacked in feed(partial(_images, config, bank), step, config.steps, device):
            started = time.perf_counter()
            set_rate(optimizer, cosine_rate(step, config.steps, warmup=config.warmup))
            draw = make_generator(config.seed, config.method, step)
            with mixed_precision(device):
                terms = peer_terms(config, net, frozen, clean.to(device), attacked.to(device), step, draw)
            loss = torch.stack(list(terms.values())).sum()
            norm = descend(optimizer, loss)
            average.update(parameters)
            step += 1
            row = {"grad_norm": norm, "seconds": time.perf_counter() - started}
            run.append({"key": f"step-{step}", "step": step, **{k: v.item() for k, v in terms.items()}, **row})
            advance(1, f"loss {loss.item():.3f}")
            if step % config.save_every == 0 or step == config.steps:
                finished = averaged(net, average)
                save_net(run.dir / "weights", finished, kind=config.method, options=_options(config), dtype=HALF)
                write_card(run, config.method)
                save_training(checkpoint, parameters, optimizer, step, average)  # last: then the weights are there
    return run.dir / "weights"


def start(config: PeerConfig) -> PurifierNet:
    """The prior's weights; no bound on the residual, which none of the papers has."""
    from codefend.purifiers import WEIGHTS

    prior, _ = load_net(config.prior or WEIGHTS / "prior")
    net = PurifierNet(NetConfig(**{**prior.config.__dict__, "residual_bound": None}))
    net.load_state_dict(prior.state_dict())
    return net


def _options(config: PeerConfig) -> Mapping[str, float]:
    """What inference must know of the training."""
    return {"noise": config.noise} if config.uses("noise") else {}


def _images(config: PeerConfig, bank: Bank | None, step: int) -> tuple[Tensor, Tensor]:
    """A step's clean pictures ``[batch, 3, H, W]`` and their attacked forms, empty where the method needs none."""
    rng = np.random.default_rng([config.seed, 9, step])
    if bank is None:
        return training_pictures(rng, config.batch, first_scene=3_000_000 + step * config.batch), torch.empty(0)
    clean, attacked = bank.draw(rng, config.batch)
    untouched = round(config.clean * config.batch)
    return clean, torch.cat([clean[:untouched], attacked[untouched:]])


def peer_terms(
    config: PeerConfig, net: PurifierNet, frozen: Frozen, clean: Tensor, attacked: Tensor, step: int, draw: Generator
) -> dict[str, Tensor]:
    """The terms of the method's loss, each a scalar."""
    match config.method:
        case "hgd":
            tower = frozen.towers[step % len(frozen.towers)]
            with torch.no_grad():
                right = tower.features(clean)
            ones = clean.new_ones(len(clean))
            restored = clip(net(attacked, ones, 0 * ones))
            return {"features": peers.feature_distance(tower.features(restored), right).mean()}
        case "flowpure":
            s = peers.sample_flow_times(len(clean), generator=draw).to(clean)
            return {"flow": peers.flow_loss(net, clean, attacked, s).mean()}
        case "flowpure-gauss":
            s = peers.sample_flow_times(len(clean), generator=draw).to(clean)
            return {"flow": peers.gauss_flow_loss(net, clean, s, noise=config.noise, generator=draw).mean()}
        case _:
            return _bridged(config, net, frozen, clean, attacked, draw)


def _bridged(
    config: PeerConfig, net: PurifierNet, frozen: Frozen, clean: Tensor, attacked: Tensor, draw: Generator
) -> dict[str, Tensor]:
    """ADBM's loss, on perturbations made now (ADBM) or static ones (CoDefend-R)."""
    assert frozen.pocket is not None
    sigma, end = peers.sample_bridge_levels(len(clean), times=config.times, generator=draw)
    sigma, noise = sigma.to(clean), noise_like(clean, draw)
    if config.method == "adbm":
        objective = word_objective(frozen.pocket, clean)
        net.requires_grad_(False)  # only the pictures' gradient is wanted
        attacked = sign_steps(
            # The paper keeps t and z fixed over the steps, and so do we here.
            lambda images: objective(clip(peers.adbm_predict(net, clean, images, sigma, end, noise))),
            clean,
            eps=config.eps,
            steps=config.mining_steps,
            rel_step=1.0,
            generator=draw,
        )
        net.requires_grad_(True)
    predicted = peers.adbm_predict(net, clean, attacked, sigma, end, noise)
    terms = {"bridge": peers.adbm_loss(predicted, clean, sigma).mean()}
    if config.w_alignment:
        terms["alignment"] = config.w_alignment * _misalignment(frozen.pocket, predicted, clean).mean()
    return terms


def _misalignment(pocket: Pocket, predicted: Tensor, clean: Tensor) -> Tensor:
    """1 - cosine of each vision token to the words that the clean picture's token is nearest to, ``[B, T]``.

    It stands in for the paper's "cross-modal alignment", of which no formula is public.
    """
    with torch.no_grad():
        words = pocket.word_scores(clean, WORDS).argmax(-1, keepdim=True)
    return 1 - pocket.word_scores(clip(predicted), WORDS).gather(-1, words).squeeze(-1)
