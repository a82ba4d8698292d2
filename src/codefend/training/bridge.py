"""Train the bridge: supervised diffusion from adversarial to clean pictures, guided by the victim.

Each step takes pairs from a bank or mines them by attacking *through* the present purifier with fresh noise, then
descends L = bridge + features + words + directional. Every term has one weight in `BridgeConfig`; zero is off.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from codefend.attacks import objectives
from codefend.attacks.pgd import PGD
from codefend.devices import default_device, training_precision
from codefend.diffusion import bridge_predict, charbonnier, noise_like, sample_bridge_sigmas, sample_bridge_times
from codefend.nets import NetConfig, PurifierNet, load_net, save_net
from codefend.pairs import WORDS, Tower, read_pairs, word_objective
from codefend.runs import make_generator
from codefend.tasks.pictures import training_pictures
from codefend.training.banks import StreamedBank
from codefend.training.feed import feed
from codefend.training.guides import OwnGuide, find_guide
from codefend.training.parallel import Workers
from codefend.training.state import Average, cosine_rate, restore_training, save_training, set_rate
from codefend.types import Budget, Objective, UserError
from codefend.victims.pocket import Pocket


@dataclass(frozen=True)
class BridgeConfig:
    """Everything that decides a bridge's weights."""

    pairs: tuple[str, ...] = ()  # bank folders made by `codefend pairs`, Parquet ones too
    stream: bool = False  # read shards as they are drawn instead of holding all in memory
    prior: str = ""  # weights folder to fine-tune from, a prior's or a bridge's; empty: the shipped prior
    victim: str = "pocket"  # guides by its word scores, any other by its own words; a name or a weights folder
    encoders: tuple[str, ...] = ("lite0", "lite2")  # guide by their features, one a step in turn; "victim": its own
    residual_bound: float | None = 64 / 255  # most that a noise-free evaluation may change in a pixel
    seed: int = 0
    steps: int = 1200
    batch: int = 16
    micro: int = 1  # batches a step, shared out by the processes of `accelerate launch`, else one after another
    mined: float = 0.4  # share of steps whose pairs are mined through the purifier
    mining_steps: int = 2
    max_eps: float = 12 / 255  # of mined pairs
    clean: float = 0.15  # share of pictures left clean: near-identity on them
    max_sigma: float = 0.1  # pixels: noise in attacked pictures, drawn as in `sample_bridge_sigmas`
    gamma: float = 0.0  # noise of the bridge itself
    w_bridge: float = 8.0
    w_identity: float = 0.0  # on top of w_bridge, for the pictures left clean
    w_features: float = 1.0
    w_words: float = 0.3
    w_direction: float = 0.2
    lr: float = 8e-4
    warmup: int = 50
    save_every: int = 50  # steps

    @property
    def untouched(self) -> int:
        """How many of a batch are left clean, the first ones."""
        return round(self.clean * self.batch)


def train_bridge(config: BridgeConfig, folder: str | Path) -> Path:
    """Train in ``folder`` and return the folder with the weights; the same call resumes.

    Raises UserError when pairs, prior or victim are missing, or the folder was made with another config.
    """
    workers = Workers.join(config.micro)
    run = workers.open_run(folder, {"train": "bridge", **asdict(config)})
    bank = StreamedBank(config.pairs) if config.stream else Bank(config.pairs)
    device = default_device()
    guide = find_guide(config.victim, config.encoders)
    net = start_from_prior(config).to(device).train()
    optimizer = torch.optim.AdamW([{"params": list(net.parameters()), "base": config.lr}], betas=(0.9, 0.99))
    parameters = dict(net.named_parameters())
    average, checkpoint = Average(parameters), run.dir / "checkpoint.safetensors"
    step = restore_training(checkpoint, parameters, optimizer, average)
    with workers.progress("bridge", config.steps, done=step) as advance:
        for batches in feed(partial(workers.share, partial(_images, config, bank)), step, config.steps, device):
            started = time.perf_counter()
            set_rate(optimizer, cosine_rate(step, config.steps, warmup=config.warmup))
            optimizer.zero_grad()
            found = [_descend(config, net, guide, *images, number) for number, images in batches]
            workers.sum_gradients(list(net.parameters()))
            terms = workers.mean_terms(found)
            norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            average.update(parameters)
            step += 1
            mined = any(not attacked.numel() for _, (_, attacked) in batches)
            row = {"mined": mined, "grad_norm": float(norm), "seconds": time.perf_counter() - started}
            run.append({"key": f"step-{step}", "step": step, **terms, **row})
            advance(1, f"loss {sum(terms.values()):.3f}")
            if workers.main and (step % config.save_every == 0 or step == config.steps):
                save_training(checkpoint, parameters, optimizer, step, average)
                averaged = PurifierNet(net.config)
                averaged.load_state_dict(average.values)
                save_net(run.dir / "weights", averaged, kind="bridge", dtype=torch.float16)
    return run.dir / "weights"


def _descend(
    config: BridgeConfig, net: PurifierNet, guide: Guide | OwnGuide, clean: Tensor, attacked: Tensor, number: int
) -> dict[str, Tensor]:
    """Add the gradients of micro-batch ``number`` to the network's; its weighted terms."""
    device, draw = default_device(), make_generator(config.seed, "bridge", number)
    with training_precision(device):
        pair = training_pair(config, net, guide, clean.to(device), attacked.to(device), number, draw)
        terms = bridge_terms(config, net, guide, *pair, number, draw)
    (torch.stack(list(terms.values())).sum() / config.micro).backward()
    return terms


def start_from_prior(config: BridgeConfig) -> PurifierNet:
    """The prior's weights in a network with the bridge's residual bound."""
    from codefend.purifiers import WEIGHTS

    prior, _ = load_net(config.prior or WEIGHTS / "prior")
    net = PurifierNet(NetConfig(**{**prior.config.__dict__, "residual_bound": config.residual_bound}))
    net.load_state_dict(prior.state_dict())
    return net


class Bank:
    """The pairs of some folders in memory, 8 bits. Raises UserError when a folder, or all of them, hold none."""

    def __init__(self, folders: Sequence[str]) -> None:
        if not folders:
            raise UserError("a bridge is trained on pairs: make some with `codefend pairs`, then --set pairs=FOLDER")
        shards = [shard for folder in folders for shard in read_pairs(folder)]
        self.clean = torch.cat([clean for clean, _, _ in shards])
        self.attacked = torch.cat([attacked for _, attacked, _ in shards])

    def draw(self, rng: np.random.Generator, count: int) -> tuple[Tensor, Tensor]:
        """Pairs ``[count, 3, H, W]`` in [0, 1], some mirrored: a new view of the same perturbation."""
        picks = torch.from_numpy(rng.integers(len(self.clean), size=count))
        clean, attacked = self.clean[picks].float() / 255, self.attacked[picks].float() / 255
        return (clean.flip(-1), attacked.flip(-1)) if rng.random() < 0.3 else (clean, attacked)


class Guide:
    """The frozen networks that say what a picture means: feature towers, and a pocket's words."""

    def __init__(self, pocket: Pocket, towers: list[Tower]) -> None:
        self.pocket, self.towers = pocket, towers

    def tower(self, step: int) -> Tower:
        return self.towers[step % len(self.towers)]

    def away(self, clean: Tensor) -> Objective:
        """What mining lowers beside the features' objective."""
        return word_objective(self.pocket, clean)

    def divergence(self, clean: Tensor, seen: Tensor) -> Tensor:
        """How far the words for the seen pictures are from those for the clean ones, ``[B, T]``."""
        with torch.no_grad():
            wanted = (self.pocket.word_scores(clean, WORDS) / 0.05).log_softmax(-1)
        said = (self.pocket.word_scores(seen, WORDS) / 0.05).log_softmax(-1)
        return F.kl_div(said, wanted, log_target=True, reduction="none").sum(-1)


def _images(config: BridgeConfig, bank: Bank | StreamedBank, step: int) -> tuple[Tensor, Tensor]:
    """A step's pictures ``[batch, 3, H, W]`` and their attacked forms, which are empty where they are to be mined."""
    rng = np.random.default_rng([config.seed, 7, step])
    if rng.random() < config.mined:
        return training_pictures(rng, config.batch, first_scene=3_000_000 + step * config.batch), torch.empty(0)
    return bank.draw(rng, config.batch)


def training_pair(
    config: BridgeConfig,
    net: PurifierNet,
    guide: Guide | OwnGuide,
    clean: Tensor,
    attacked: Tensor,
    step: int,
    draw: Generator,
) -> tuple[Tensor, Tensor]:
    """Clean and attacked pictures of one step, mined now where ``attacked`` is empty. The first few stay clean."""
    if not attacked.numel():
        attacked = mine(config, net, guide, clean, np.random.default_rng([config.seed, 8, step]), step, draw)
    return clean, torch.cat([clean[: config.untouched], attacked[config.untouched :]])


def mine(
    config: BridgeConfig,
    net: PurifierNet,
    guide: Guide | OwnGuide,
    clean: Tensor,
    rng: np.random.Generator,
    step: int,
    draw: Generator,
) -> Tensor:
    """Attack through the purifier: exact gradients, fresh noise at each step (ADBM, arXiv 2408.00315, fixes it)."""
    sigma = float(rng.uniform(0, config.max_sigma)) if rng.random() < 0.5 else 0.0
    ones = clean.new_ones(len(clean))

    def purified(images: Tensor) -> Tensor:
        noisy = images + sigma * noise_like(images, draw) if sigma else images
        restored: Tensor = net(noisy, ones, ones * sigma).clamp(0, 1)
        return restored

    inner = guide.away(clean) if rng.random() < 0.5 else objectives.features_away(guide.tower(step), clean)
    budget = Budget(eps=float(rng.uniform(1 / 255, config.max_eps)), steps=config.mining_steps)
    net.requires_grad_(False)  # only the pictures' gradient is wanted
    attacked = PGD(rel_step=1.5)(lambda images: inner(purified(images)), clean, budget, generator=draw)
    net.requires_grad_(True)
    return attacked.detach()


def bridge_terms(
    config: BridgeConfig,
    net: PurifierNet,
    guide: Guide | OwnGuide,
    clean: Tensor,
    attacked: Tensor,
    step: int,
    draw: Generator,
) -> dict[str, Tensor]:
    """The weighted terms of the loss, each a scalar."""
    s = sample_bridge_times(len(clean), at_one=0.6, generator=draw).to(clean)
    sigma = sample_bridge_sigmas(len(clean), clean=0.5, high=config.max_sigma, generator=draw).to(clean)
    restored = bridge_predict(net, clean, attacked, s, sigma, gamma=config.gamma, generator=draw)
    distance = charbonnier(restored, clean)
    terms = {"bridge": config.w_bridge * distance.mean()}
    if config.w_identity:
        terms["identity"] = config.w_identity * distance[: config.untouched].sum() / config.batch
    seen = restored.clamp(0, 1)
    if config.w_features or config.w_direction:
        tower = guide.tower(step)
        with torch.no_grad():
            right, wrong = tower.features(clean), tower.features(attacked)
        tokens = tower.features(seen)
        closeness = F.cosine_similarity(tokens, right, dim=-1)
        error = (tokens - right).square().sum(-1) / right.square().sum(-1)
        terms["features"] = config.w_features * (1 - closeness + 0.1 * error).mean()
        terms["direction"] = config.w_direction * _direction(tokens, right, wrong).mean()
    if config.w_words:
        terms["words"] = config.w_words * guide.divergence(clean, seen).mean()
    return terms


def _direction(tokens: Tensor, right: Tensor, wrong: Tensor, *, margin: float = 0.1) -> Tensor:
    """Away from the attacked feature, towards the clean one: a hinge ``[B, T]`` where the attack moved the token."""
    moved = F.cosine_similarity(wrong, right, dim=-1) < 0.9
    gap = F.cosine_similarity(tokens, wrong, dim=-1) - F.cosine_similarity(tokens, right, dim=-1)
    return F.relu(gap + margin) * moved
