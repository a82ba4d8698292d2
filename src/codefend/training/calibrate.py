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
from codefend.core.assets import needs
from codefend.core.devices import default_device
from codefend.core.files import write_atomic
from codefend.core.progress import progress
from codefend.core.runs import read_config, read_rows
from codefend.core.seeds import make_generator
from codefend.purifiers.base import NetPurifier
from codefend.purifiers.detection import TEXTURE_FLOOR, Detector, features, threshold_at
from codefend.purifiers.nets import CONFIG_FILE
from codefend.tasks.training_images import draw_training_images, own_photographs
from codefend.training.camera import AUGMENTATIONS, augment_camera
from codefend.training.pairs import read_pairs
from codefend.types import CodefendError

BATCH = 16
EPS_RANGES = ((0, 2), (2, 4), (4, 8), (8, 16), (16, 255))  # of the reported detection rates, in 1/255


@dataclass(frozen=True)
class CalibrateConfig:
    """The data that a detector is calibrated on."""

    pairs: tuple[str, ...] = ()  # banks that the weights were not trained on: another seed of `codefend pairs`
    clean: int = 2000  # further clean images: half for the threshold, half to measure its false-positive rate
    rate: float = 0.01  # false-positive rate of the threshold
    seed: int = 0
    photographs: str = ""  # a folder of your own photographs among the clean images


def calibrate(folder: str | Path, config: CalibrateConfig) -> Detector:
    """Fit, set the threshold, measure, and write ``detector`` into ``folder``'s config.json; returns it.

    Half of the pairs fit the score, the other half measures the detection rate at the threshold. New clean images set
    the threshold and measure its false-positive rate. All images, also those below the perturbations, are used
    unchanged, after JPEG compression and with sensor noise (`training.camera`). Banks of the training are refused:
    their residuals are smaller than those of new images. Raises CodefendError for that, too few images, or a folder
    that is no purifier's.
    """
    purifier = purifiers.load(Path(folder))
    if not isinstance(purifier, NetPurifier):
        raise CodefendError(f"{folder} holds no network to calibrate")
    _refuse_training_banks(Path(folder), config.pairs)
    if not 0 < config.rate < 0.5 or config.clean * config.rate < 2:
        raise CodefendError(f"a rate of {config.rate:g} can't be set on {config.clean} clean images: draw more")
    own_photographs(config.photographs)  # fail early where the folder is missing
    clean, attacked, eps = _bank_features(purifier, config)
    if len(clean) < 32:
        raise CodefendError(f"{len(clean)} pairs are too few to calibrate on: make some hundred")
    weights, bias = fit_logistic(clean[::2].flatten(0, 1), attacked[::2].flatten(0, 1))
    fresh = _scores(_clean_features(purifier, config), weights, bias)
    threshold = threshold_at(fresh[::2], config.rate)
    rate = float((fresh[1::2] > threshold).float().mean())
    detections = _scores(attacked[1::2], weights, bias) > threshold
    report = {
        "pairs": list(config.pairs),
        "pairs_fitted": len(clean[::2]),
        "clean_measured": len(fresh[1::2]),
        "own_photographs": bool(config.photographs),
        "found": _detection_rates(detections, eps[1::2]),
        "seed": config.seed,
    }
    detector = Detector(weights, bias, threshold, rate, report, texture_floor=TEXTURE_FLOOR)
    path = Path(folder) / CONFIG_FILE
    meta: dict[str, Any] = {**json.loads(path.read_text(encoding="utf-8")), "detector": detector.to_dict()}
    write_atomic(path, json.dumps(meta, indent=2) + "\n")
    return detector


def fit_logistic(clean: Tensor, attacked: Tensor, *, ridge: float = 1e-4) -> tuple[tuple[float, ...], float]:
    """Logistic regression on features ``[N, K]`` and ``[M, K]``, with balanced classes: weights and bias.

    On standardized features, with an L2 penalty of ``ridge`` / 2, so that separable classes have a finite solution.
    Raises CodefendError when scikit-learn is missing.
    """
    with needs("calibration", "train"):
        from sklearn.linear_model import LogisticRegression
    both = torch.cat([clean, attacked]).double()
    mean, std = both.mean(0), both.std(0).clamp_min(1e-6)
    labels = [0] * len(clean) + [1] * len(attacked)
    model = LogisticRegression(
        C=1 / (ridge * len(both)), class_weight="balanced", solver="newton-cholesky", tol=1e-8, max_iter=1000
    )
    model.fit(((both - mean) / std).numpy(), labels)
    weights = torch.from_numpy(model.coef_[0]) / std
    return tuple(weights.tolist()), float(model.intercept_[0] - (weights * mean).sum())


def _refuse_training_banks(folder: Path, pairs: Iterable[str]) -> None:
    training = folder / "training.json"
    if not training.is_file():
        return
    trained = [bank["config"] for bank in json.loads(training.read_text(encoding="utf-8"))["pairs"]]
    for bank in pairs:
        if read_config(bank) in trained:
            raise CodefendError(f"{folder} was trained on {bank}: calibrate on a bank made with another seed")


def _bank_features(purifier: NetPurifier, config: CalibrateConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Features of the banks' clean and adversarial images after each augmentation, ``[N, 3, 8]``, and eps ``[N]``."""
    if not config.pairs:
        raise CodefendError("calibration needs held-out pairs: `codefend pairs --set seed=1`, then --set pairs=FOLDER")
    shards = [shard for bank in config.pairs for shard in read_pairs(bank)]
    rows = [row for bank in config.pairs for row in sorted(read_rows(bank), key=lambda row: int(row["key"][6:]))]
    eps = torch.tensor([pair["eps"] for row in rows for pair in row["pairs"]])
    clean, attacked = [], []
    with progress("calibrate", len(shards)) as advance:
        for number, (images, adversarial, _) in enumerate(shards):
            rng = np.random.default_rng([config.seed, 13, number])
            perturbation = (adversarial.float() - images.float()) / 255
            augmented = [augment_camera(images.float() / 255, rng, [one]) for one in AUGMENTATIONS]
            perturbed = [(batch + perturbation).clamp(0, 1) for batch in augmented]
            clean.append(torch.stack([_features(purifier, b, config.seed, 0, number) for b in augmented], 1))
            attacked.append(torch.stack([_features(purifier, b, config.seed, 1, number) for b in perturbed], 1))
            advance()
    count = min(len(eps), sum(map(len, clean)))  # an interrupted bank has a shard without its row
    return torch.cat(clean)[:count], torch.cat(attacked)[:count], eps[:count]


def _clean_features(purifier: NetPurifier, config: CalibrateConfig) -> Tensor:
    """Features of clean images that are in no bank and no training, ``[clean, 8]``."""
    parts, own = [], own_photographs(config.photographs)
    with progress("clean images", config.clean) as advance:
        for start in range(0, config.clean, BATCH):
            rng = np.random.default_rng([config.seed, 12, start])
            count = min(BATCH, config.clean - start)
            images = augment_camera(draw_training_images(rng, count, first_scene=9_000_000 + start, own=own), rng)
            parts.append(_features(purifier, images, config.seed, "clean", start))
            advance(count)
    return torch.cat(parts)


def _features(purifier: NetPurifier, images: Tensor, seed: int, *names: object) -> Tensor:
    with torch.no_grad():
        generator = make_generator(seed, "calibrate", *names)
        parts = images.to(default_device()).split(BATCH)
        return torch.cat([features(part, purifier.transformed(part, generator=generator)).cpu() for part in parts])


def _scores(inputs: Tensor, weights: tuple[float, ...], bias: float) -> Tensor:
    return (inputs @ inputs.new_tensor(weights) + bias).sigmoid()


def _detection_rates(detections: Tensor, eps: Tensor) -> dict[str, dict[str, float]]:
    """Share of adversarial images above the threshold, by eps: ``{"2-4/255": {"share": ..., "n": ...}}``."""
    table = {}
    for low, high in EPS_RANGES:
        inside = (eps * 255 > low) & (eps * 255 <= high)
        if bool(inside.any()):
            table[f"{low}-{high}/255"] = {"share": float(detections[inside].float().mean()), "n": int(inside.sum())}
    return table
