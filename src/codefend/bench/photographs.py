"""Purifiers on photographs that no training saw, judged by ImageNet encoders: features, classes and pixels.

Crops of the held-out photographs (`tasks.pictures.HELD_OUT`) at several scales. Each encoder is attacked on the bare
picture (oblivious): its tokens are driven away from the clean ones. The task is to agree with the encoder's own class
for the clean crop. Lite0 and Lite2 guided the shipped bridge, Lite1 never did. ``lite1@320`` sees each crop resized to
320 pixels, as models do whose preprocessing resizes: the attack's pattern then lies on another grid than the crop's
pixels. ``adaptive`` defenses are also attacked through themselves (T2). Crops of one photograph are no independent
examples: with four photographs the figures say how these fare, not how all would. A folder of other photographs can be
judged instead.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from codefend.attacks.apgd import APGD
from codefend.attacks.norms import quantize_in_budget
from codefend.attacks.objectives import features_away
from codefend.bench.config import DefenseChoice, check_radius
from codefend.bench.frozen import check_unchanged, fingerprints
from codefend.bench.results import BARE
from codefend.core.devices import default_device
from codefend.core.images import quantize8
from codefend.core.runs import Row, check_run, make_generator, open_run, progress
from codefend.core.settings import recorded
from codefend.core.specs import parse_encoders, split_specs
from codefend.defense import DefendedVictim, Defense
from codefend.encoders.efficientnet_lite import NAMES
from codefend.encoders.views import View
from codefend.purifiers.diffusion import noise_like
from codefend.tasks.image_metrics import psnr
from codefend.tasks.training_images import HELD_OUT, own_paths, own_photographs
from codefend.training.pairs import Tower
from codefend.types import Budget, CodefendError, WhiteBox

if TYPE_CHECKING:
    from codefend.bench.setup import Contender

SEEN = ("lite0", "lite2")  # encoders that guided the shipped bridge


@dataclass(frozen=True)
class PhotographsConfig:
    """Crops are ``side`` pixels; of each photograph the first ``limit`` are judged."""

    encoders: tuple[str, ...] = ("lite0", "lite2", "lite1")  # or lite1@320: at that many pixels instead of ``side``
    # DiffPure at its best t on the pocket's tasks (LOG.md), and quicker.
    defenses: tuple[str, ...] = (BARE, "jpeg", "diffpure:t=0.03", "diffpure:t=0.05,steps=5", "bridge")
    eps: float = 8.0  # in 1/255, l-inf
    steps: int = 20  # of APGD on each encoder's features
    limit: int | None = None  # crops a photograph; None: 8
    side: int = 224
    seed: int = 0
    # What follows is left out of the saved config while it is as here: runs from before it existed go on.
    photographs: str = ""  # a folder of other ones, which no training saw either; empty: the held-out ones
    adaptive: tuple[str, ...] = ()  # of the defenses: those whose attacker sees them
    eot: int = 1  # draws of noise that such an attacker averages over, where a defense draws any

    def __post_init__(self) -> None:
        object.__setattr__(self, "defenses", split_specs(self.defenses))
        object.__setattr__(self, "adaptive", split_specs(self.adaptive))
        if foreign := [label for label in self.adaptive if label not in self.defenses or label == BARE]:
            raise CodefendError(f"adaptive names some of the defenses, and {foreign[0]!r} is none of them")
        unknown = [label for label in self.encoders if parse_encoders(label)[0][0] not in NAMES]
        if unknown or not self.encoders:
            raise CodefendError(f"unknown encoder {unknown[0] if unknown else ''!r}; known: {', '.join(NAMES)}")
        for label in self.encoders:
            _shown_side(label, self.side)
        check_radius(self.eps)
        if self.eot < 1:
            raise CodefendError(f"eot is at least 1, got {self.eot}")
        if self.side % 32 or self.side < 32:
            raise CodefendError(f"side must be a multiple of 32, got {self.side}")

    @property
    def count(self) -> int:
        return 8 if self.limit is None else self.limit

    def recorded(self) -> dict[str, object]:
        """The fields for the run's config."""
        return recorded(self, later="photographs")


def _shown_side(label: str, side: int) -> int:
    """The pixels a side that the encoder of ``label`` sees. Raises CodefendError unless a multiple of 32 follows an @."""
    return parse_encoders(label)[0][1] or side


class Encoder(Tower):
    """A tower that names classes, too."""

    @torch.no_grad()
    def classes(self, images: Tensor) -> Tensor:
        """ImageNet-1k classes ``[B]``."""
        seen = self.view(images.to(self.encoder.fc.weight.device))
        return self.encoder.logits(seen).argmax(1).to(images.device)


def names(config: PhotographsConfig) -> list[str]:
    """The photographs: the held-out ones, or the folder's files by their place in it.

    Raises CodefendError for a folder without pictures.
    """
    if not config.photographs:
        return list(HELD_OUT)
    return [str(path.relative_to(config.photographs)) for path in own_paths(config.photographs)]


def whole(name: str, config: PhotographsConfig) -> Tensor:
    """The photograph ``[3, H, W]`` in [0, 1]. Raises CodefendError when it can't be read, or scikit-image is missing."""
    if config.photographs:
        return own_photographs(config.photographs)[names(config).index(name)]
    try:
        from skimage import data
    except ImportError as error:
        raise CodefendError("the photographs are scikit-image's: pip install 'codefend[train]'") from error
    return torch.from_numpy(getattr(data, name)().copy()).permute(2, 0, 1).float() / 255


def crops(name: str, config: PhotographsConfig) -> Tensor:
    """``[count, 3, side, side]`` in [0, 1], 8 bits: windows of a whole to a half of the photograph's shorter side.

    Raises CodefendError as `whole` does.
    """
    picture, place = whole(name, config)[None], names(config).index(name)
    height, width = picture.shape[-2:]
    found = []
    for index in range(config.count):
        rng = np.random.default_rng([config.seed, 13, place, index])
        window = int(min(height, width) * rng.uniform(0.5, 1.0))
        top, left = int(rng.integers(height - window + 1)), int(rng.integers(width - window + 1))
        view = picture[..., top : top + window, left : left + window]
        size = (config.side, config.side)
        found.append(F.interpolate(view, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1))
    return quantize8(torch.cat(found))


def run_photographs(config: PhotographsConfig, folder: str | Path) -> list[Row]:
    """Fill ``folder`` with a row for each crop, encoder and defense, and ``photographs.md``; the same call resumes.

    Raises CodefendError for an unknown encoder or defense, or a folder made with another config or other weights.
    """
    from codefend.bench.setup import Loaders, contender

    described = {"photographs": True, **config.recorded()}
    check_run(folder, described)
    found = names(config)
    probe = crops(found[0], config)[:1]
    contenders = {label: contender(label, Loaders(), probe, config.seed) for label in config.defenses}
    weights = fingerprints(DefenseChoice.parse(label).name for label in config.defenses)
    with open_run(folder, described) as run:
        if (bench := run.dir / "bench.json").exists():
            check_unchanged(run.dir, json.loads(bench.read_text(encoding="utf-8"))["weights"], weights)
        else:
            run.write("bench.json", json.dumps({"weights": weights}, indent=2) + "\n")
        work = [(encoder, name) for encoder in config.encoders for name in found]
        with progress("photographs", len(work)) as advance:
            for encoder, name in work:
                judged = (*config.defenses, *(f"{label}|T2" for label in config.adaptive))
                keys = [f"{encoder}|{name}-{i}|{label}" for i in range(config.count) for label in judged]
                if not all(run.has(key) for key in keys):
                    for row in _judge(config, encoder, name, contenders):
                        run.append(row)
                advance(1, f"{encoder} {name}")
        rows = run.rows()
        run.write("photographs.md", table(config, rows))
    return rows


def _judge(config: PhotographsConfig, label: str, name: str, contenders: Mapping[str, Contender]) -> list[Row]:
    clean = crops(name, config).to(default_device())
    encoder = Encoder(parse_encoders(label)[0][0], View(_shown_side(label, config.side)))
    draw = make_generator(config.seed, "photographs", label, name)
    attacked = _attacked(config, encoder, clean, draw)
    right, classes = encoder.features(clean), encoder.classes(clean)
    place = {"encoder": label, "photograph": name}
    rows: list[Row] = []

    def seen_through(defense: Defense, kind: str, images: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            draw = make_generator(config.seed, "defense", label, name, kind)
            purified = defense.images(images, generator=draw)
            seen = quantize8(purified)
            found = {f"cosine_{kind}": F.cosine_similarity(encoder.features(seen), right, dim=-1).mean(1)}
        found[f"agrees_{kind}"] = (encoder.classes(seen) == classes).float()
        found[f"psnr_{kind}"] = psnr(seen, clean)
        if (flagged := _flagged(defense, images, purified)) is not None:
            found[f"flagged_{kind}"] = flagged
        if kind == "clean":
            found["agrees_noised"] = (encoder.classes(_as_noisy(clean, seen, draw)) == classes).float()
        return found

    def add(defense: str, found: dict[str, Tensor], suffix: str = "", **more: str) -> None:
        for i in range(len(clean)):
            key = f"{label}|{name}-{i}|{defense}{suffix}"
            values = {what: float(column[i]) for what, column in found.items()}
            rows.append({"key": key, **place, "crop": i, "defense": defense, **more, **values})

    for defense, which in contenders.items():
        found = seen_through(which.defense, "clean", clean)
        add(defense, found | seen_through(which.defense, "attacked", attacked))
    for defense in config.adaptive:
        which = contenders[defense]
        draw = make_generator(config.seed, "photographs", label, name, defense)
        behind: Any = DefendedVictim(encoder, which.adaptive, generator=draw)
        eot = config.eot if which.randomized else 1
        through = _attacked(config, behind, clean, draw, eot=eot, reference=encoder)  # the tokens that it is judged by
        add(defense, seen_through(which.defense, "attacked", through), "|T2", threat="T2")
    return rows


def _attacked(
    config: PhotographsConfig,
    victim: WhiteBox,
    clean: Tensor,
    draw: Generator,
    *,
    eot: int = 1,
    reference: WhiteBox | None = None,
) -> Tensor:
    budget = Budget(eps=config.eps / 255, steps=config.steps, eot=eot)
    objective = features_away(victim, clean, reference=reference)
    return quantize_in_budget(APGD()(objective, clean, budget, generator=draw), clean, budget)


@torch.no_grad()
def _flagged(defense: Defense, images: Tensor, purified: Tensor) -> Tensor | None:
    """Which pictures the purifier's calibrated detector finds suspicious, ``[B]``; None where there is none."""
    detector = getattr(defense.purifier, "detector", None)
    if detector is None:
        return None
    purifier: Any = defense.purifier  # whatever has a detector judges
    flagged: Tensor = (purifier.judge(images, purified) > detector.threshold).float()
    return flagged


def _as_noisy(clean: Tensor, changed: Tensor, draw: Generator) -> Tensor:
    """White noise on ``clean`` as large, picture by picture, as its change: what any change of that size costs."""
    sizes = (changed - clean).square().mean((1, 2, 3), keepdim=True).sqrt()
    return quantize8((clean + sizes * noise_like(clean, draw)).clamp(0, 1))


def table(config: PhotographsConfig, rows: Sequence[Row]) -> str:
    """Markdown: a line for each defense; means over all crops, for every encoder its own attack."""
    seen = ["seen" if parse_encoders(e)[0][0] in SEEN else "unseen" for e in config.encoders]
    heads = [f"{e} ({known}): cosine, class" for e, known in zip(config.encoders, seen, strict=True)]
    found = list(dict.fromkeys(row["photograph"] for row in rows))  # not read again: the folder may be gone
    which = (
        f"{len(found)} photographs of your own" if config.photographs else f"Held-out photographs ({', '.join(found)})"
    )
    lines = [
        f"{which}, {config.count} crops of {config.side} px each; APGD-"
        f"{config.steps} on the encoder's features at {config.eps:g}/255, oblivious. Cosine of the tokens to the clean "
        f"picture's and agreement with its class, attacked (n = {config.count * len(found)} each); clean agreement "
        f"over all encoders (n = {config.count * len(found) * len(config.encoders)}), in brackets under white noise as "
        "large as what the defense changed. Flagged: clean and attacked pictures above the detector's threshold. dB: "
        "of the pictures that were changed. Seen: it guided the shipped bridge; other weights may have seen others. "
        "T2: attacked through the defense.",
        "",
        f"| defense | clean, dB | clean class | flagged | {' | '.join(heads)} |",
        "|---" * (4 + len(heads)) + "|",
    ]
    for defense in config.defenses:
        mine = [row for row in rows if row["defense"] == defense and "threat" not in row]
        finite = [row["psnr_clean"] for row in mine if row["psnr_clean"] is not None]
        pixels = f"{fmean(finite):.1f}" if finite else "-"
        if 0 < len(finite) < len(mine):
            pixels += f" ({1 - len(finite) / len(mine):.0%} unchanged)"
        agreement = f"{fmean(row['agrees_clean'] for row in mine):.1%}"
        if all("agrees_noised" in row for row in mine):  # rows from before it was asked have none
            agreement += f" ({fmean(row['agrees_noised'] for row in mine):.1%})"
        cells = " | ".join((_share_flagged(mine, ("clean", "attacked")), *_attacked_cells(config, mine)))
        lines.append(f"| {defense} | {pixels} | {agreement} | {cells} |")
        if through := [row for row in rows if row["defense"] == defense and row.get("threat") == "T2"]:
            cells = " | ".join((_share_flagged(through, ("attacked",)), *_attacked_cells(config, through)))
            lines.append(f"| {defense}, seen by the attacker (T2) | - | - | {cells} |")
    return "\n".join(lines) + "\n"


def _share_flagged(rows: Sequence[Row], kinds: Sequence[str]) -> str:
    if not all(f"flagged_{kind}" in row for row in rows for kind in kinds):
        return "-"
    return ", ".join(f"{fmean(row[f'flagged_{kind}'] for row in rows):.0%}" for kind in kinds)


def _attacked_cells(config: PhotographsConfig, rows: Sequence[Row]) -> list[str]:
    cells = []
    for encoder in config.encoders:
        own = [row for row in rows if row["encoder"] == encoder]
        cosine, agrees = (fmean(row[f"{what}_attacked"] for row in own) for what in ("cosine", "agrees"))
        cells.append(f"{cosine:.3f}, {agrees:.0%}")
    return cells
