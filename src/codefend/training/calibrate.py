"""Fit the detection score of a purifier on held-out pairs and write it into the weights' config.json."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from codefend import purifiers
from codefend.core.devices import default_device
from codefend.core.files import write_atomic
from codefend.core.runs import make_generator, progress, read_config, read_rows
from codefend.purifiers.base import NetPurifier
from codefend.purifiers.detection import TEXTURE_FLOOR, Detector, features, fit, threshold_at
from codefend.purifiers.nets import CONFIG_FILE
from codefend.tasks.training_images import own_photographs, training_pictures
from codefend.training.camera import WAYS, photographed
from codefend.training.pairs import read_pairs
from codefend.types import CodefendError

BATCH = 16


@dataclass(frozen=True)
class CalibrateConfig:
    """On what a detector is calibrated."""

    pairs: tuple[str, ...] = ()  # banks that the weights were not trained on: another seed of `codefend pairs`
    clean: int = 2000  # further clean pictures, which cost no attack: half for the threshold, half to measure its rate
    rate: float = 0.01  # wanted share of clean pictures above the threshold
    seed: int = 0
    photographs: str = ""  # a folder of your own photographs among the clean pictures


def calibrate(folder: str | Path, config: CalibrateConfig) -> Detector:
    """Fit, set the threshold, measure, and write ``detector`` into ``folder``'s config.json; returns it.

    Half of the pairs fit the score, the other half measures how many attacked pictures are found at the threshold;
    clean pictures drawn anew set the threshold and measure its false-positive rate. All are seen as they are, as JPEG
    files and with a camera's noise (`tasks.camera`), beneath the attack as well. Training's own banks are refused:
    their residuals are smaller than those of pictures never seen. Raises CodefendError for that, too few pictures, or a
    folder that is no purifier's.
    """
    purifier = purifiers.load(Path(folder))
    if not isinstance(purifier, NetPurifier):
        raise CodefendError(f"{folder} holds no network to calibrate")
    _refuse_training_banks(Path(folder), config.pairs)
    if not 0 < config.rate < 0.5 or config.clean * config.rate < 2:
        raise CodefendError(f"a rate of {config.rate:g} can't be set on {config.clean} clean pictures: draw more")
    own_photographs(config.photographs)  # a missing folder is told now
    clean, attacked, eps = _bank_features(purifier, config)
    if len(clean) < 32:
        raise CodefendError(f"{len(clean)} pairs are too few to calibrate on: make some hundred")
    weights, bias = fit(clean[::2].flatten(0, 1), attacked[::2].flatten(0, 1))
    fresh = _scores(_fresh_features(purifier, config), weights, bias)
    threshold = threshold_at(fresh[::2], config.rate)
    rate = float((fresh[1::2] > threshold).float().mean())
    found = _scores(attacked[1::2], weights, bias) > threshold
    report = {
        "pairs": list(config.pairs),
        "pairs_fitted": len(clean[::2]),
        "clean_measured": len(fresh[1::2]),
        "own_photographs": bool(config.photographs),  # among them
        "found": _found_by_strength(found, eps[1::2]),
        "seed": config.seed,
    }
    detector = Detector(weights, bias, threshold, rate, report, texture_floor=TEXTURE_FLOOR)
    path = Path(folder) / CONFIG_FILE
    meta: dict[str, Any] = {**json.loads(path.read_text(encoding="utf-8")), "detector": detector.to_dict()}
    write_atomic(path, json.dumps(meta, indent=2) + "\n")
    return detector


def _refuse_training_banks(folder: Path, pairs: Iterable[str]) -> None:
    training = folder / "training.json"
    if not training.is_file():
        return
    trained = [bank["config"] for bank in json.loads(training.read_text(encoding="utf-8"))["pairs"]]
    for place in pairs:
        if read_config(place) in trained:
            raise CodefendError(f"{folder} was trained on {place}: calibrate on a bank made with another seed")


def _bank_features(purifier: NetPurifier, config: CalibrateConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Features of the banks' clean and attacked pictures in each of WAYS, ``[N, 3, 8]`` each, and their eps ``[N]``."""
    if not config.pairs:
        raise CodefendError("calibration needs held-out pairs: `codefend pairs --set seed=1`, then --set pairs=FOLDER")
    shards = [shard for place in config.pairs for shard in read_pairs(place)]
    rows = [row for place in config.pairs for row in sorted(read_rows(place), key=lambda row: int(row["key"][6:]))]
    eps = torch.tensor([pair["eps"] for row in rows for pair in row["pairs"]])
    clean, attacked = [], []
    with progress("calibrate", len(shards)) as advance:
        for number, (plain, perturbed, _) in enumerate(shards):
            rng = np.random.default_rng([config.seed, 13, number])
            changes = (perturbed.float() - plain.float()) / 255
            seen = [photographed(plain.float() / 255, rng, [way]) for way in WAYS]
            found = [_features(purifier, kept, config.seed, 0, number) for kept in seen]
            clean.append(torch.stack(found, 1))
            found = [_features(purifier, (kept + changes).clamp(0, 1), config.seed, 1, number) for kept in seen]
            attacked.append(torch.stack(found, 1))
            advance()
    known = min(len(eps), sum(map(len, clean)))  # a bank that was cut short has a shard without its row
    return torch.cat(clean)[:known], torch.cat(attacked)[:known], eps[:known]


def _fresh_features(purifier: NetPurifier, config: CalibrateConfig) -> Tensor:
    """Features of clean pictures that no bank and no training has, ``[clean, 8]``."""
    parts, own = [], own_photographs(config.photographs)
    with progress("clean pictures", config.clean) as advance:
        for start in range(0, config.clean, BATCH):
            rng = np.random.default_rng([config.seed, 12, start])
            count = min(BATCH, config.clean - start)
            images = photographed(training_pictures(rng, count, first_scene=9_000_000 + start, own=own), rng)
            parts.append(_features(purifier, images, config.seed, "clean", start))
            advance(count)
    return torch.cat(parts)


def _features(purifier: NetPurifier, images: Tensor, seed: int, *names: object) -> Tensor:
    with torch.no_grad():
        draw = make_generator(seed, "calibrate", *names)
        parts = images.to(default_device()).split(BATCH)
        return torch.cat([features(part, purifier.transformed(part, generator=draw)).cpu() for part in parts])


def _scores(found: Tensor, weights: tuple[float, ...], bias: float) -> Tensor:
    return (found @ found.new_tensor(weights) + bias).sigmoid()


def _found_by_strength(found: Tensor, eps: Tensor) -> dict[str, dict[str, float]]:
    """Share of attacked pictures above the threshold, by budget: ``{"1-2/255": {"share": ..., "n": ...}}``."""
    table = {}
    for low, high in ((0, 2), (2, 4), (4, 8), (8, 16), (16, 255)):
        inside = (eps * 255 > low) & (eps * 255 <= high)
        if bool(inside.any()):
            table[f"{low}-{high}/255"] = {"share": float(found[inside].float().mean()), "n": int(inside.sum())}
    return table
