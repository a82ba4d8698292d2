"""Train the bridge: supervised diffusion from adversarial to clean pictures, guided by the victim.

Each step takes pairs from a bank or mines them by attacking *through* the present purifier with fresh noise, then
descends L = bridge + features + words + directional. Every term has one weight in `BridgeConfig`; zero is off.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from codefend.attacks import objectives
from codefend.attacks.pgd import PGD
from codefend.core.devices import default_device, mixed_precision
from codefend.core.runs import Run, check_run, make_generator
from codefend.core.settings import recorded
from codefend.encoders.views import draw_view
from codefend.purifiers.base import clip
from codefend.purifiers.diffusion import (
    bridge_predict,
    charbonnier,
    noise_like,
    sample_bridge_sigmas,
    sample_bridge_times,
)
from codefend.purifiers.nets import NetConfig, PurifierNet, load_net, save_net
from codefend.tasks.language import training_texts
from codefend.tasks.scenes import compose, load_photographs
from codefend.tasks.training_images import own_photographs, training_pictures
from codefend.training.banks import StreamedBank
from codefend.training.camera import jpeg_file
from codefend.training.card import write_card
from codefend.training.feed import feed
from codefend.training.growth import grown
from codefend.training.guides import Guide, OwnGuide, find_guide
from codefend.training.mining import sign_steps
from codefend.training.pairs import OWN, Tower, read_pairs
from codefend.training.parallel import Workers
from codefend.training.replay import Replays
from codefend.training.state import Average, cosine_rate, restore_training, save_training, set_rate
from codefend.types import Budget, CodefendError, Objective, WhiteBox

Text = tuple[str, str]  # prompt, answer
HALF = torch.float16
Images = tuple[Tensor, Tensor, list[Text]]  # clean, attacked, texts: see `_images`


@dataclass(frozen=True)
class BridgeConfig:
    """Everything that decides a bridge's weights."""

    pairs: tuple[str, ...] = ()  # bank folders made by `codefend pairs`, Parquet ones too
    prior: str = ""  # weights folder to fine-tune from, a prior's or a bridge's; empty: the shipped prior; "none"
    victim: str = "pocket"  # guides by its word scores, any other by its own words; a name or a weights folder
    encoders: tuple[str, ...] = ("lite0", "lite2")  # guide by their features, one a step in turn; "victim": its own
    residual_bound: float | None = 64 / 255  # most that a noise-free evaluation may change in a pixel
    seed: int = 0
    steps: int = 1200
    batch: int = 16
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
    # What follows is off unless set, and left out of the saved config while it is: runs from before it existed go on.
    stream: bool = False  # read shards as they are drawn instead of holding all in memory
    micro: int = 1  # batches a step, shared out by the processes of `accelerate launch`, else one after another
    without: tuple[str, ...] = ()  # kinds of attack and target networks that banks and mining leave out
    noise_free: float = 0.5  # share of pictures, and of mined steps, without noise
    min_sigma: float = 0.0  # least noise of the others
    sigma: float = 0.0  # noise that the finished purifier adds unless told otherwise
    at_one: float = 0.6  # share of pictures at s = 1, where one evaluation starts
    eps_ramp: int = 0  # steps in which the budget of mining grows evenly from 1/255 to max_eps
    lean: bool = False  # mine by `sign_steps`: a third cheaper, and each picture has its own eps
    mined_average: float = 0.0  # share of mined steps that attack the averaged network
    answers: float = 0.0  # share of mined steps that attack the language-model loss, on scenes
    answers_batch: int = 4  # pictures in such a step: the language model is dear
    w_answers: float = 0.0  # in such a step: language-model loss of the true answers on the purified pictures
    photographs: str = ""  # a folder of your own photographs, for pairs mined in the loop
    # Steps on the same pairs, each made harder by the step before (`replay.py`). Then nothing else is mined: `mined` is
    # the share of batches that start at random instead of in a bank; of mining's own settings only `max_eps` counts.
    replay: int = 1
    replay_step: float = 0.5  # by how much, in units of each pair's own radius
    channels: tuple[int, ...] = ()  # of a larger network than the prior's, which it starts from; empty: the prior's
    blocks: tuple[int, ...] = ()  # the same
    jpeg: float = 0.0  # share of a bank's pairs whose clean picture is compressed first
    strength: float = 1.0  # of the change that the finished purifier makes unless told otherwise
    views: float = 0.0  # share of steps guided by another view of the pictures (`views.py`)

    def __post_init__(self) -> None:
        if self.replay < 1 or self.save_every % self.replay:
            raise CodefendError(f"replay must divide save_every={self.save_every}, got {self.replay}")
        if self.replay > 1 and {"features", "words"} & set(self.without):
            raise CodefendError(
                "replayed pairs climb the whole loss, features and words: set replay=1 to leave one out"
            )
        if not 0 < self.strength <= 1.5:
            raise CodefendError(f"strength must be above 0, to 1.5, got {self.strength:g}")
        if self.views and set(self.encoders) <= {OWN}:
            raise CodefendError("views are of encoders by name, such as lite0: a victim of your own sees its own view")
        if self.mined and {"features", "words"} <= set(self.without):
            raise CodefendError("without=features,words leaves nothing to mine: keep one, or set mined=0")

    def recorded(self) -> dict[str, object]:
        """The fields for the run's config."""
        return recorded(self, later="stream")


@dataclass(frozen=True)
class Step:
    """What one micro-batch goes by, beside its network and pictures."""

    config: BridgeConfig
    guide: Guide | OwnGuide
    number: int  # seeds every draw
    draw: Generator  # of noise: what is drawn first changes what is drawn next
    texts: Sequence[Text] = ()  # of each picture, where the language model is attacked


def train_bridge(config: BridgeConfig, folder: str | Path) -> Path:
    """Train in ``folder`` and return the folder with the weights; the same call resumes.

    Raises CodefendError when pairs, prior or victim are missing, or the folder was made with another config.
    """
    described = {"train": "bridge", **config.recorded()}
    check_run(folder, described)
    workers = Workers.join(config.micro)
    bank = open_bank(config)
    own_photographs(config.photographs)  # a missing folder is told now
    device = default_device()
    guide = find_guide(config.victim, config.encoders)
    net = start_from_prior(config).to(device).train()
    run = workers.open_run(folder, described)  # a misspelt name has left nothing behind
    optimizer = torch.optim.AdamW([{"params": list(net.parameters()), "base": config.lr}], betas=(0.9, 0.99))
    parameters = dict(net.named_parameters())
    average, checkpoint = Average(parameters), run.dir / "checkpoint.safetensors"
    step = restore_training(checkpoint, parameters, optimizer, average)
    replays = Replays(max_eps=config.max_eps, rel_step=config.replay_step)
    with workers.progress("bridge", config.steps, done=step) as advance:
        for batches in feed(partial(workers.share, partial(_images, config, bank)), step, config.steps, device):
            started = time.perf_counter()
            set_rate(optimizer, cosine_rate(step, config.steps, warmup=config.warmup))
            optimizer.zero_grad()
            found = [_add_gradients(config, net, average, replays, guide, images, number) for number, images in batches]
            workers.sum_gradients(list(net.parameters()))
            terms = workers.mean_terms(found)
            norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            average.update(parameters)
            step += 1
            mined = any(not attacked.numel() for _, (_, attacked, _) in batches)
            row = {"mined": mined, "grad_norm": float(norm), "seconds": time.perf_counter() - started}
            run.append({"key": f"step-{step}", "step": step, **terms, **row})
            advance(1, f"loss {sum(terms.values()):.3f}")
            if isinstance(run, Run) and (step % config.save_every == 0 or step == config.steps):
                options = {"sigma": config.sigma} if config.sigma else {}
                options |= {"strength": config.strength} if config.strength != 1 else {}
                save_net(run.dir / "weights", averaged(net, average), kind="bridge", options=options, dtype=HALF)
                write_card(run, "bridge")
                save_training(checkpoint, parameters, optimizer, step, average)  # last: then the weights are there
    return run.dir / "weights"


def _add_gradients(
    config: BridgeConfig,
    net: PurifierNet,
    average: Average,
    replays: Replays,
    guide: Guide | OwnGuide,
    images: Images,
    number: int,
) -> dict[str, Tensor]:
    """Add the gradients of micro-batch ``number`` to the network's; its weighted terms, the same for every batch."""
    device = default_device()
    clean, attacked, texts = images
    clean, attacked = clean.to(device), attacked.to(device)
    step = Step(config, guide, number, make_generator(config.seed, "bridge", number), texts)
    replayed, slot = config.replay > 1, number % config.micro
    with mixed_precision(device):
        if replayed:
            if number // config.micro % config.replay == 0:
                untouched = round(config.clean * len(clean))
                replays.begin(slot, clean, attacked, untouched=untouched, generator=step.draw)
            attacked = replays.pictures(slot)
        else:
            target = averaged(net, average) if _attacks_average(config, number) else net
            clean, attacked = training_pair(step, target, clean, attacked)
        terms = bridge_terms(step, net, clean, attacked)
    (torch.stack(list(terms.values())).sum() / config.micro).backward()
    if replayed:
        replays.climb(slot, clean, attacked)
    if config.w_answers and "answers" not in terms:
        terms["answers"] = terms["bridge"].new_zeros(())
    return terms


def averaged(net: PurifierNet, average: Average) -> PurifierNet:
    """A copy of the network with the averaged weights."""
    copy = PurifierNet(net.config).to(next(net.parameters()).device)
    copy.load_state_dict(average.values)
    return copy


def _attacks_average(config: BridgeConfig, step: int) -> bool:
    return bool(config.mined_average) and np.random.default_rng([config.seed, 10, step]).random() < config.mined_average


def start_from_prior(config: BridgeConfig) -> PurifierNet:
    """The prior's weights in a network with the bridge's residual bound; the identity where the prior is "none"."""
    from codefend.purifiers import WEIGHTS

    if config.prior == "none":
        torch.manual_seed(config.seed)  # the network's initial weights only
        small = PurifierNet(NetConfig(residual_bound=config.residual_bound))
        return grown(small, channels=config.channels, blocks=config.blocks, seed=config.seed)
    prior, _ = load_net(config.prior or WEIGHTS / "prior")
    net = PurifierNet(NetConfig(**{**prior.config.__dict__, "residual_bound": config.residual_bound}))
    net.load_state_dict(prior.state_dict())
    return grown(net, channels=config.channels, blocks=config.blocks, seed=config.seed)


class Bank:
    """The pairs of some folders in memory, 8 bits. Raises CodefendError when a folder, or all of them, hold none."""

    def __init__(self, folders: Sequence[str], *, without: Sequence[str] = ()) -> None:
        if not folders:
            raise CodefendError("this is trained on pairs: make some with `codefend pairs`, then --set pairs=FOLDER")
        shards = [shard for folder in folders for shard in read_pairs(folder, without=without)]
        if not shards:
            raise CodefendError(f"no pairs are left in {', '.join(folders)} without {', '.join(without)}")
        self.clean = torch.cat([clean for clean, _, _ in shards])
        self.attacked = torch.cat([attacked for _, attacked, _ in shards])

    def draw(self, rng: np.random.Generator, count: int) -> tuple[Tensor, Tensor]:
        """Pairs ``[count, 3, H, W]`` in [0, 1], some mirrored: a new view of the same perturbation."""
        picks = torch.from_numpy(rng.integers(len(self.clean), size=count))
        clean, attacked = self.clean[picks].float() / 255, self.attacked[picks].float() / 255
        return (clean.flip(-1), attacked.flip(-1)) if rng.random() < 0.3 else (clean, attacked)


def open_bank(config: BridgeConfig) -> Bank | StreamedBank:
    """The pairs of the config's folders. Raises CodefendError as the banks do, or for a streamed one `without`."""
    if config.stream and config.without:
        raise CodefendError("a streamed bank leaves nothing out: set stream=false or drop without")
    return StreamedBank(config.pairs) if config.stream else Bank(config.pairs, without=config.without)


def _images(config: BridgeConfig, bank: Bank | StreamedBank, number: int) -> Images:
    """The pictures of micro-batch ``number``: those of the first step that trains on them."""
    return _drawn(config, bank, _first_of_replays(config, number))


def _first_of_replays(config: BridgeConfig, number: int) -> int:
    """The micro-batch that was the first to train on the pictures of micro-batch ``number``; itself without replay."""
    step, slot = divmod(number, config.micro)
    return step // config.replay * config.replay * config.micro + slot


@lru_cache(maxsize=8)  # replayed pictures are not composed again
def _drawn(config: BridgeConfig, bank: Bank | StreamedBank, step: int) -> Images:
    """A step's pictures ``[B, 3, H, W]``, their attacked forms, and a (prompt, answer) each.

    Attacked forms are empty where they are to be mined; texts are, but where the language model is to be attacked.
    """
    rng = np.random.default_rng([config.seed, 7, step])
    first = 3_000_000 + step * config.batch
    if rng.random() >= config.mined:
        return *compressed(*bank.draw(rng, config.batch), rng, share=config.jpeg), []
    if config.answers and rng.random() < config.answers:
        scenes = [compose("train", first + i, photographs=load_photographs()) for i in range(config.answers_batch)]
        said = [training_texts(scene, rng) for scene in scenes]
        chosen = [texts[int(rng.integers(len(texts)))] for texts in said]
        return torch.stack([scene.image for scene in scenes]), torch.empty(0), chosen
    own = own_photographs(config.photographs)
    return training_pictures(rng, config.batch, first_scene=first, own=own), torch.empty(0), []


def compressed(clean: Tensor, attacked: Tensor, rng: np.random.Generator, *, share: float) -> tuple[Tensor, Tensor]:
    """A ``share`` of the pairs as if the clean picture had been a JPEG file, under the same perturbation.

    Most photographs were: a network that never saw that takes the codec's traces for an attack's.
    """
    chosen = rng.random(len(clean)) < share if share else ()
    kept, changes = clean.clone(), attacked - clean
    for index in np.flatnonzero(chosen):
        kept[index] = jpeg_file(clean[index], rng)
    return kept, (kept + changes).clamp(0, 1)


def training_pair(step: Step, net: PurifierNet, clean: Tensor, attacked: Tensor) -> tuple[Tensor, Tensor]:
    """Clean and attacked pictures of one step, mined now where ``attacked`` is empty. The first few stay clean."""
    untouched = round(step.config.clean * len(clean))
    if not attacked.numel():
        mined = mine(replace(step, texts=step.texts[untouched:]), net, clean[untouched:])
        return clean, torch.cat([clean[:untouched], mined])
    return clean, torch.cat([clean[:untouched], attacked[untouched:]])


def mine(step: Step, net: PurifierNet, clean: Tensor) -> Tensor:
    """Attack through the purifier: exact gradients, fresh noise at each step (ADBM, arXiv 2408.00315, fixes it)."""
    config, draw = step.config, step.draw
    rng = np.random.default_rng([config.seed, 8, step.number])
    noisy = rng.random() < 1 - config.noise_free
    sigma = float(rng.uniform(config.min_sigma, config.max_sigma)) if noisy else 0.0
    ones = clean.new_ones(len(clean))
    inner = _inner(step, clean, rng)

    def objective(images: Tensor) -> Tensor:
        noised = images + sigma * noise_like(images, draw) if sigma else images
        return inner(clip(net(noised, ones, ones * sigma)))  # a judged attack, too, passes clipping straight through

    grown = min(1.0, (step.number + 1) / config.eps_ramp) if config.eps_ramp else 1.0
    top = 1 / 255 + grown * (config.max_eps - 1 / 255)
    net.requires_grad_(False)  # only the pictures' gradient is wanted
    if config.lean:
        eps = torch.from_numpy(rng.uniform(1 / 255, top, len(clean))).to(clean)
        rel_step = 1.25 if config.mining_steps == 1 else 1.5 / config.mining_steps
        mined = sign_steps(objective, clean, eps=eps, steps=config.mining_steps, rel_step=rel_step, generator=draw)
    else:
        budget = Budget(eps=float(rng.uniform(1 / 255, top)), steps=config.mining_steps)
        mined = PGD(rel_step=1.5)(objective, clean, budget, generator=draw)
    net.requires_grad_(True)
    return mined.detach()


def _inner(step: Step, clean: Tensor, rng: np.random.Generator) -> Objective:
    """What mining lowers, of the purified pictures: features or words, evenly; the answers where there are texts."""
    guide, without = step.guide, step.config.without
    worded = rng.random() < 0.5
    if step.texts:
        prompts, answers = [t[0] for t in step.texts], [t[1] for t in step.texts]
        if worded:
            return objectives.untargeted(guide.victim, prompts, answers)
        return objectives.targeted(guide.victim, prompts, answers[1:] + answers[:1])  # another picture's answer
    if "features" in without or (worded and "words" not in without):
        return guide.away(clean)
    return objectives.features_away(guide.tower(step.number), clean)


def bridge_terms(step: Step, net: PurifierNet, clean: Tensor, attacked: Tensor) -> dict[str, Tensor]:
    """The weighted terms of the loss, each a scalar."""
    config, guide, draw = step.config, step.guide, step.draw
    s = sample_bridge_times(len(clean), at_one=config.at_one, generator=draw).to(clean)
    sigma = sample_bridge_sigmas(
        len(clean), clean=config.noise_free, low=config.min_sigma, high=config.max_sigma, generator=draw
    ).to(clean)
    restored = bridge_predict(net, clean, attacked, s, sigma, gamma=config.gamma, generator=draw)
    distance = charbonnier(restored, clean)
    terms = {"bridge": config.w_bridge * distance.mean()}
    if config.w_identity:
        untouched = round(config.clean * len(clean))
        terms["identity"] = config.w_identity * distance[:untouched].sum() / len(clean)
    seen = restored.clamp(0, 1)
    if config.w_features or config.w_direction:
        tower = _shown(step, guide.tower(step.number))
        with torch.no_grad():
            right, wrong = tower.features(clean), tower.features(attacked)
        tokens = tower.features(seen)
        closeness = F.cosine_similarity(tokens, right, dim=-1)
        error = (tokens - right).square().sum(-1) / right.square().sum(-1)
        terms["features"] = config.w_features * (1 - closeness + 0.1 * error).mean()
        terms["direction"] = config.w_direction * _direction(tokens, right, wrong).mean()
    if config.w_words:
        terms["words"] = config.w_words * guide.divergence(clean, seen).mean()
    if config.w_answers and step.texts:
        loss = guide.victim.loss(seen, [t[0] for t in step.texts], [t[1] for t in step.texts])
        terms["answers"] = config.w_answers * loss.mean()
    return terms


def _shown(step: Step, tower: Tower | WhiteBox) -> Tower | WhiteBox:
    """The tower, in a share of steps through another view: what is restored must not be so on one grid only.

    Replays of the same pictures keep theirs: a perturbation that climbs through one view climbs nowhere through many.
    """
    rng = np.random.default_rng([step.config.seed, 11, _first_of_replays(step.config, step.number)])
    if isinstance(tower, Tower) and rng.random() < step.config.views:
        return tower.through(draw_view(rng))
    return tower


def _direction(tokens: Tensor, right: Tensor, wrong: Tensor, *, margin: float = 0.1) -> Tensor:
    """Away from the attacked feature, towards the clean one: a hinge ``[B, T]`` where the attack moved the token."""
    moved = F.cosine_similarity(wrong, right, dim=-1) < 0.9
    gap = F.cosine_similarity(tokens, wrong, dim=-1) - F.cosine_similarity(tokens, right, dim=-1)
    return F.relu(gap + margin) * moved
