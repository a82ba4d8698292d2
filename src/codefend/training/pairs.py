"""Make and read pairs of adversarial and clean images, the training data of supervised purification.

A bank is a run folder: ``rows.jsonl`` describes the attack of each pair (kind, target network, eps, steps, decrease of
the objective); ``pairs-00000.safetensors`` and so on hold the images as 8-bit ``clean`` and ``attacked``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from codefend.attacks import objectives
from codefend.attacks.norms import quantize_in_budget
from codefend.attacks.pgd import PGD
from codefend.core.checkpoints import load_checkpoint, save_checkpoint
from codefend.core.devices import default_device
from codefend.core.images import quantize8
from codefend.core.processes import StartPool, map_in_order, worker_pool
from codefend.core.progress import progress
from codefend.core.runs import Row, check_run, open_run, read_rows
from codefend.core.seeds import make_generator
from codefend.core.settings import recorded
from codefend.encoders import ENCODERS
from codefend.encoders.views import View, ViewedEncoder, draw_view
from codefend.tasks.language import CAPTION_PROMPT, captions, training_texts
from codefend.tasks.scenes import compose, load_photographs
from codefend.tasks.training_images import draw_training_images, own_photographs
from codefend.training.frozen import OWN, AnyEncoder, check_encoders, load_encoders, word_objective
from codefend.types import Budget, CodefendError, Objective, WhiteBox
from codefend.victims.pocket import Pocket

KINDS = ("features", "towards", "words", "answers")

Build = Callable[[slice, Tensor], Objective]  # a part of a shard and its clean images -> the attack's objective


@dataclass(frozen=True)
class PairsConfig:
    """Settings of a bank of pairs."""

    victim: str = "pocket"  # a name or a weights folder; must be a pocket for the kinds "words" and "answers"
    encoders: tuple[str, ...] = ("lite0", "lite2")  # whose features are attacked; "victim": the victim's own
    count: int = 2560
    kinds: tuple[str, ...] = ("features", "towards", "words", "words", "answers")  # one a shard, in turn
    max_eps: float = 16 / 255
    steps: int = 8
    answer_steps: int = 6  # of "answers", twenty times as expensive
    answer_shards: int = 8  # largest number of shards of "answers"; the others become "features"
    seed: int = 0
    # The fields from here on are recorded only where they differ from their defaults: older banks resume.
    photographs: str = ""  # a folder of your own photographs, for "features" and "towards"
    views: float = 0.0  # share of "features" and "towards" shards whose encoder has another view (`encoders.views`)
    shares: tuple[float, ...] = ()  # of scenes, photographs and dead leaves in them; empty: the default mix
    shard: int = 32  # pairs a file; a quarter of them are attacked at once

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if kind not in KINDS:
                raise CodefendError(f"unknown kind of pairs {kind!r}; known: {', '.join(KINDS)}")
        if self.count < 1:
            raise CodefendError(f"count must be above 0, got {self.count}")
        if self.shard < 4 or self.shard % 4:
            raise CodefendError(f"shard must be a multiple of 4, got {self.shard}")
        if not 0 <= self.views <= 1:
            raise CodefendError(f"views is a share from 0 to 1, got {self.views}")
        if self.views and set(self.encoders) <= {OWN}:
            raise CodefendError(
                f"views need encoders by name, {', '.join(ENCODERS)}: a victim of your own has one view"
            )
        if self.shares and (len(self.shares) != 3 or min(self.shares) < 0 or abs(sum(self.shares) - 1) > 1e-6):
            raise CodefendError(f"shares are three that sum to 1 (scenes, photographs, dead leaves), got {self.shares}")

    def recorded(self) -> dict[str, object]:
        """The fields for the run's config."""
        return recorded(self, later="photographs")


def make_pairs(config: PairsConfig, folder: str | Path, *, workers: int = 1, pool: StartPool | None = None) -> Path:
    """Fill ``folder`` with pairs; the same call resumes after the last whole shard.

    ``workers`` processes, of ``pool`` if it is given, make the bank of one process with as many threads; each has
    networks of its own. Raises CodefendError for an unknown encoder or kind, or a folder made with another config.
    """
    described = {"pairs": True, **config.recorded()}
    check_run(folder, described)
    check_encoders(config.encoders)
    own_photographs(config.photographs)  # fail early where the folder is missing
    source = _open_source(config)  # also for workers: what is wrong is said before the folder is created
    run = open_run(folder, described)
    shards = range(-(-config.count // config.shard))
    todo = [shard for shard in shards if not run.has(f"shard-{shard}")]
    rows: Iterator[Row] = map(partial(source.make, run.dir), todo)
    if workers > 1 or pool is not None:
        workers = min(workers, max(1, len(todo)))
        started = (pool or worker_pool)(workers, _start, config)
        rows = map_in_order(started, workers, partial(_make_shard, run.dir), todo)
    done = (len(shards) - len(todo)) * config.shard
    with progress("pairs", len(shards) * config.shard, done=done) as advance:
        for row in rows:  # appended in order: a row settles that its file is whole
            run.append(row)
            advance(config.shard)
    return run.dir


def _open_source(config: PairsConfig) -> _ShardSource:
    from codefend import victims

    victim = victims.load_white_box(config.victim)
    return _ShardSource(config, victim, load_encoders(config.encoders, victim))


_source: list[_ShardSource] = []  # of a worker process


def _start(config: PairsConfig) -> None:
    _source.append(_open_source(config))


def _make_shard(folder: Path, shard: int) -> Row:
    return _source[-1].make(folder, shard)


def first_scene(seed: int, shard: int, size: int) -> int:
    """The number of a shard's first scene: banks of different seeds share none, so that one can be held out."""
    return 2_000_000 + seed * 10_000_000 + shard * size


@dataclass(frozen=True)
class _ShardSource:
    """Attacks the networks of a bank, one shard at a time."""

    config: PairsConfig
    victim: WhiteBox
    encoders: Sequence[AnyEncoder]

    def make(self, folder: Path, shard: int) -> Row:
        """Write the file of a shard; returns its row."""
        config, rng = self.config, np.random.default_rng([self.config.seed, 5, shard])
        kind = config.kinds[shard % len(config.kinds)]
        if kind == "answers" and shard // len(config.kinds) >= config.answer_shards:
            kind = "features"
        encoder = self.encoders[int(rng.integers(len(self.encoders)))]
        if config.views and rng.random() < config.views and isinstance(encoder, ViewedEncoder):
            encoder = encoder.through(draw_view(rng))
        clean, build = self._attack(kind, encoder, rng, shard)
        clean = quantize8(clean).to(default_device())
        steps = config.answer_steps if kind == "answers" else config.steps
        attacked, pairs = self._perturb(clean, build, rng, shard, steps)
        path = folder / f"pairs-{shard:05d}.safetensors"
        save_checkpoint(path, {"clean": _to_bytes(clean), "attacked": _to_bytes(attacked)}, {"kind": kind})
        on_features = kind in ("features", "towards")
        row = {"kind": kind, "target": (encoder if on_features else self.victim).name, "steps": steps, "pairs": pairs}
        if on_features and isinstance(encoder, ViewedEncoder) and encoder.view != View():
            row["view"] = asdict(encoder.view)
        return {"key": f"shard-{shard}", **row}

    def _perturb(
        self, clean: Tensor, build: Build, rng: np.random.Generator, shard: int, steps: int
    ) -> tuple[Tensor, list[Row]]:
        """The adversarial images of a shard, and eps and decrease of the objective ("fall") of each pair.

        eps is drawn uniformly for each quarter of the shard: an attack has one budget a call.
        """
        attacked, pairs = [], list[Row]()
        for part, images in enumerate(clean.split(self.config.shard // 4)):
            budget = Budget(eps=float(rng.uniform(1 / 255, self.config.max_eps)), steps=steps)
            objective = build(slice(part * len(images), (part + 1) * len(images)), images)
            generator = make_generator(self.config.seed, "pairs", shard, part)
            adversarial = quantize_in_budget(PGD()(objective, images, budget, generator=generator), images, budget)
            with torch.no_grad():
                falls = (objective(images) - objective(adversarial)).tolist()
            pairs += [{"eps": budget.eps, "fall": fall} for fall in falls]
            attacked.append(adversarial)
        return torch.cat(attacked), pairs

    def _attack(self, kind: str, encoder: AnyEncoder, rng: np.random.Generator, shard: int) -> tuple[Tensor, Build]:
        """The clean images of a shard and their attack."""
        first = first_scene(self.config.seed, shard, self.config.shard)
        match kind:
            case "features":
                clean = self._images(rng, first)
                return clean, lambda part, images: objectives.features_away(encoder, images)
            case "towards":
                clean, others = self._images(rng, first), self._images(rng, first + 1_000_000)
                return clean, lambda part, images: objectives.features_towards(encoder, others[part].to(images.device))
            case "words":
                return self._attack_words(rng, first)
            case _:
                return self._attack_answers(rng, first)

    def _images(self, rng: np.random.Generator, first: int) -> Tensor:
        own = own_photographs(self.config.photographs)
        return draw_training_images(rng, self.config.shard, first_scene=first, own=own, shares=self.config.shares)

    def _attack_words(self, rng: np.random.Generator, first: int) -> tuple[Tensor, Build]:
        """Word scores away from the clean image's words, or, for half of the shards, towards another image's."""
        pocket = self.victim
        scenes = [compose("train", first + i, photographs=load_photographs()) for i in range(self.config.shard)]
        if not isinstance(pocket, Pocket):
            raise CodefendError(f"pairs of kind 'words' need a pocket victim, not {pocket.name}")
        clean = torch.stack([scene.image for scene in scenes])
        targets = clean.roll(1, 0) if rng.random() < 0.5 else None
        return clean, lambda part, images: word_objective(
            pocket, images, None if targets is None else targets[part].to(images.device)
        )

    def _attack_answers(self, rng: np.random.Generator, first: int) -> tuple[Tensor, Build]:
        """Language-model loss of captions and answers up, or, for half of the shards, that of another image's down."""
        count, victim = self.config.shard, self.victim
        scenes = [compose("train", first + i, photographs=load_photographs()) for i in range(count)]
        texts = [training_texts(scene, rng)[int(rng.integers(1, 4))] for scene in scenes]
        for i in range(0, count, 2):
            texts[i] = (CAPTION_PROMPT, captions(scenes[i])[0])
        prompts, answers = [prompt for prompt, _ in texts], [answer for _, answer in texts]
        clean = torch.stack([scene.image for scene in scenes])
        if rng.random() < 0.5:
            others = answers[2:] + answers[:2]
            return clean, lambda part, images: objectives.targeted(victim, prompts[part], others[part])
        return clean, lambda part, images: objectives.untargeted(victim, prompts[part], answers[part])


def _to_bytes(images: Tensor) -> Tensor:
    return (images * 255).round().to("cpu", torch.uint8)


def read_pairs(folder: str | Path, *, without: Sequence[str] = ()) -> Iterator[tuple[Tensor, Tensor, str]]:
    """Yield ``(clean, attacked, kind)`` of each shard, 8-bit ``[n, 3, H, W]``.

    ``without``: attack kinds and target networks, such as "lite2", to leave out; Parquet made elsewhere may not name
    them. Raises CodefendError when there are no shards, or for a name that is no kind and no target of this bank.
    """
    paths, tables = (sorted(Path(folder).glob(name)) for name in ("pairs-*.safetensors", "*.parquet"))
    if not paths and tables:
        from codefend.training import pair_tables

        if without:
            names = {name for pair in pair_tables.read_descriptions(folder) for name in (pair.kind, pair.target)}
            _check_known(folder, without, names - {""})
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


def _check_known(folder: str | Path, without: Sequence[str], names: set[str]) -> None:
    """``names``: the kinds and targets in the bank. An encoder that it never attacked may be left out as well."""
    known = [*KINDS, *sorted({*ENCODERS, *names} - set(KINDS))]
    unknown = set(without) - set(known)
    if unknown:
        raise CodefendError(f"{folder} knows no {sorted(unknown)[0]!r} to leave out; known: {', '.join(known)}")
