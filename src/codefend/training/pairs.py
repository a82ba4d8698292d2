"""Make and read pairs of adversarial and clean pictures: what supervised purification is trained on.

A bank is a run folder: ``rows.jsonl`` says of each pair how it was made (attack, target network, eps, steps, how far
the objective fell); ``pairs-00000.safetensors`` and so on hold them as 8-bit ``clean`` and ``attacked``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from codefend.attacks import objectives
from codefend.attacks.norms import quantize_in_budget
from codefend.attacks.pgd import PGD
from codefend.core.devices import default_device
from codefend.core.images import quantize8
from codefend.core.runs import (
    Run,
    check_run,
    load_checkpoint,
    make_generator,
    open_run,
    progress,
    read_rows,
    save_checkpoint,
)
from codefend.core.settings import recorded
from codefend.encoders.efficientnet_lite import NAMES, EfficientNetLite
from codefend.encoders.views import View, draw_view
from codefend.tasks.language import CAPTION_PROMPT, captions, training_texts
from codefend.tasks.objects import COLOURS, THINGS
from codefend.tasks.scenes import compose, load_photographs
from codefend.tasks.training_images import own_photographs, training_pictures
from codefend.types import Budget, CodefendError, Objective, WhiteBox
from codefend.victims.pocket import Pocket

WORDS = tuple(f" {c} {t.name}" for t in THINGS if t.tinted for c in COLOURS) + tuple(
    f" {t.name}" for t in THINGS if not t.tinted
)
KINDS = ("features", "towards", "words", "answers")
OWN = "victim"  # among the encoders: the victim's own


class Tower:
    """A bare image encoder as a white box that has features only: a second family to attack."""

    def __init__(self, name: str, view: View | None = None) -> None:
        self.name, self.encoder = name, EfficientNetLite(name).to(default_device())
        self.view = view or View()

    def through(self, view: View) -> Tower:
        """The same encoder, shown another view of each picture."""
        other = copy(self)
        other.view = view
        return other

    def features(self, images: Tensor) -> Tensor:
        tokens: Tensor = self.encoder(self.view(images.to(self.encoder.fc.weight.device)))
        return tokens.to(images.device)

    def generate(self, images: Tensor, prompts: Sequence[str]) -> list[str]:
        raise TypeError(f"{self.name} is an encoder: it answers nothing")

    def loss(self, images: Tensor, prompts: Sequence[str], targets: Sequence[str]) -> Tensor:
        raise TypeError(f"{self.name} is an encoder: it has no language-model loss")


@dataclass(frozen=True)
class PairsConfig:
    """Everything that decides a bank. The shares of the attack kinds are relative."""

    victim: str = "pocket"  # a name or a weights folder; must be a pocket for the kinds "words" and "answers"
    encoders: tuple[str, ...] = ("lite0", "lite2")  # whose features are attacked; "victim" is the victim's own
    count: int = 2560
    kinds: tuple[str, ...] = ("features", "towards", "words", "words", "answers")  # one a shard, in turn
    max_eps: float = 16 / 255
    steps: int = 8
    answer_steps: int = 6  # through the language model: twenty times dearer
    answer_shards: int = 8  # at most this many shards of "answers"; the rest becomes "features"
    seed: int = 0
    # What follows is left out of the saved config while it is as here: banks from before it existed go on.
    photographs: str = ""  # a folder of your own photographs, for "features" and "towards"
    views: float = 0.0  # share of "features" and "towards" shards whose encoder sees another view (`views.py`)
    shares: tuple[float, ...] = ()  # of scenes, photographs and dead leaves in them; empty: `tasks.pictures`' own
    shard: int = 32  # pairs a file, made and written together, a quarter of them attacked at once; a GPU takes more

    def __post_init__(self) -> None:
        if self.shard < 4 or self.shard % 4:
            raise CodefendError(f"shard must be a multiple of 4, got {self.shard}")
        if not 0 <= self.views <= 1:
            raise CodefendError(f"views is a share from 0 to 1, got {self.views}")
        if self.views and set(self.encoders) <= {OWN}:
            raise CodefendError(
                f"views are of encoders by name, {', '.join(NAMES)}: a victim of your own sees its own view"
            )
        if self.shares and (len(self.shares) != 3 or min(self.shares) < 0 or abs(sum(self.shares) - 1) > 1e-6):
            raise CodefendError(f"shares are three that sum to 1 (scenes, photographs, dead leaves), got {self.shares}")

    def recorded(self) -> dict[str, object]:
        """The fields for the run's config."""
        return recorded(self, later="photographs")


def make_pairs(config: PairsConfig, folder: str | Path) -> Path:
    """Fill ``folder`` with pairs; the same call resumes after the last whole shard.

    Raises CodefendError for an unknown encoder or kind, or a folder made with another config.
    """
    from codefend import victims

    described = {"pairs": True, **config.recorded()}
    check_run(folder, described)
    unknown = [name for name in config.encoders if name not in (*NAMES, OWN)]
    if unknown:
        raise CodefendError(f"unknown encoder {unknown[0]!r}; known: {', '.join((*NAMES, OWN))}")
    own_photographs(config.photographs)  # a missing folder is told now
    victim = victims.load_white_box(config.victim)
    towers: list[Tower | WhiteBox] = [victim if name == OWN else Tower(name) for name in config.encoders]
    run = open_run(folder, described)  # a misspelt name has left nothing behind
    shards = -(-config.count // config.shard)
    with progress("pairs", shards * config.shard) as advance:
        for shard in range(shards):
            if not run.has(f"shard-{shard}"):
                _make_shard(config, run, victim, towers, shard)
            advance(config.shard)
    return run.dir


def first_scene(seed: int, shard: int, size: int) -> int:
    """Where a shard's scenes begin: banks of different seeds share none, so that one can be held out."""
    return 2_000_000 + seed * 10_000_000 + shard * size


def _make_shard(
    config: PairsConfig, run: Run, victim: WhiteBox, towers: Sequence[Tower | WhiteBox], shard: int
) -> None:
    rng = np.random.default_rng([config.seed, 5, shard])
    kind = config.kinds[shard % len(config.kinds)]
    if kind == "answers" and shard // len(config.kinds) >= config.answer_shards:
        kind = "features"
    tower = towers[int(rng.integers(len(towers)))]
    if config.views and rng.random() < config.views and isinstance(tower, Tower):
        tower = tower.through(draw_view(rng))
    own = own_photographs(config.photographs)
    clean, build = _objective(config, kind, victim, tower, rng, shard=shard, own=own)
    clean = quantize8(clean).to(default_device())
    # One eps per pair, drawn evenly; an attack has one budget a call, so the pairs of a call share their eps.
    attacked, falls = [], []
    steps = config.answer_steps if kind == "answers" else config.steps
    parts = clean.split(config.shard // 4)
    for part, images in enumerate(parts):
        budget = Budget(eps=float(rng.uniform(1 / 255, config.max_eps)), steps=steps)
        objective = build(slice(part * len(images), (part + 1) * len(images)), images)
        adversarial = PGD()(objective, images, budget, generator=make_generator(config.seed, "pairs", shard, part))
        adversarial = quantize_in_budget(adversarial, images, budget)
        with torch.no_grad():
            falls += list(
                zip([budget.eps] * len(images), (objective(images) - objective(adversarial)).tolist(), strict=True)
            )
        attacked.append(adversarial)
    path = run.dir / f"pairs-{shard:05d}.safetensors"
    save_checkpoint(path, {"clean": _bytes(clean), "attacked": _bytes(torch.cat(attacked))}, {"kind": kind})
    target = tower.name if kind in ("features", "towards") else victim.name
    pairs = [{"eps": eps, "fall": fall} for eps, fall in falls]
    seen = {}
    if kind in ("features", "towards") and isinstance(tower, Tower) and tower.view != View():
        seen = {"view": asdict(tower.view)}
    run.append({"key": f"shard-{shard}", "kind": kind, "target": target, "steps": steps, "pairs": pairs, **seen})


def _objective(
    config: PairsConfig,
    kind: str,
    victim: WhiteBox,
    tower: Tower | WhiteBox,
    rng: np.random.Generator,
    *,
    shard: int,
    own: Sequence[Tensor],
) -> tuple[Tensor, Callable[[slice, Tensor], Objective]]:
    """The clean pictures of a shard and a function from a part of them to the attack's objective."""
    count, first = config.shard, first_scene(config.seed, shard, config.shard)
    if kind in ("features", "towards"):
        clean = training_pictures(rng, count, first_scene=first, own=own, shares=config.shares)
        if kind == "features":
            return clean, lambda part, images: objectives.features_away(tower, images)
        others = training_pictures(rng, count, first_scene=first + 1_000_000, own=own, shares=config.shares)
        return clean, lambda part, images: objectives.features_towards(tower, others[part].to(images.device))
    scenes = [compose("train", first + i, photographs=load_photographs()) for i in range(count)]
    clean = torch.stack([scene.image for scene in scenes])
    if kind == "words":
        pocket = victim
        if not isinstance(pocket, Pocket):
            raise CodefendError(f"pairs of kind 'words' need a pocket victim, not {victim.name}")
        shuffled = clean.roll(1, 0)
        targeted = bool(rng.random() < 0.5)
        goals = shuffled if targeted else None
        return clean, lambda part, images: word_objective(
            pocket, images, None if goals is None else goals[part].to(images.device)
        )
    if kind == "answers":
        texts = [training_texts(scene, rng)[int(rng.integers(1, 4))] for scene in scenes]
        for i in range(0, count, 2):
            texts[i] = (CAPTION_PROMPT, captions(scenes[i])[0])
        prompts, answers = [t[0] for t in texts], [t[1] for t in texts]
        if rng.random() < 0.5:  # towards another picture's answer
            return clean, lambda part, images: objectives.targeted(
                victim, prompts[part], (answers[2:] + answers[:2])[part]
            )
        return clean, lambda part, images: objectives.untargeted(victim, prompts[part], answers[part])
    raise CodefendError(f"unknown kind of pairs {kind!r}; known: {', '.join(KINDS)}")


def word_objective(pocket: Pocket, clean: Tensor, target: Tensor | None = None) -> Objective:
    """Cross-entropy of each token's nearest words: away from those of ``clean``, or towards those of ``target``."""
    with torch.no_grad():
        labels = pocket.word_scores(clean if target is None else target, WORDS).argmax(-1)
    sign = -1.0 if target is None else 1.0

    def objective(images: Tensor) -> Tensor:
        return sign * objectives.word_loss(pocket.word_scores(images, WORDS), labels)

    return objective


def _bytes(images: Tensor) -> Tensor:
    return (images * 255).round().to("cpu", torch.uint8)


def read_pairs(folder: str | Path, *, without: Sequence[str] = ()) -> Iterator[tuple[Tensor, Tensor, str]]:
    """Yield ``(clean, attacked, kind)`` of each shard, 8-bit ``[n, 3, H, W]``, leaving out what ``without`` names.

    It may name kinds and targets, the attacked networks, such as "lite2"; of Parquet made elsewhere as far as it says
    them. Raises CodefendError when there are no shards, or for a name that is no kind and no target of this bank.
    """
    paths, tables = (sorted(Path(folder).glob(name)) for name in ("pairs-*.safetensors", "*.parquet"))
    if not paths and tables:
        from codefend.training import pair_tables

        if without:
            _check_known(folder, without, {name for made in pair_tables.described(folder) for name in made[:2] if name})
        for table in tables:
            yield from pair_tables.read_table(table, without=without)
        return
    if not paths:
        raise CodefendError(f"{folder} holds no pairs; make some with `codefend pairs --run {folder}`")
    targets = {row["key"]: row["target"] for row in read_rows(folder)} if without else {}
    _check_known(folder, without, set(targets.values()))
    for path in paths:
        if without and targets.get(f"shard-{int(path.stem.removeprefix('pairs-'))}") in without:
            continue
        tensors, state = load_checkpoint(path)
        if state["kind"] not in without:
            yield tensors["clean"], tensors["attacked"], str(state["kind"])


def _check_known(folder: str | Path, without: Sequence[str], said: set[str]) -> None:
    """``said``: the kinds and targets that the bank itself names."""
    known = [*KINDS, *sorted({*NAMES, *said} - set(KINDS))]  # an encoder that this bank never attacked is no slip
    unknown = set(without) - set(known)
    if unknown:
        raise CodefendError(f"{folder} knows no {sorted(unknown)[0]!r} to leave out; known: {', '.join(known)}")
