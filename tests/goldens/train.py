"""Seeded training curves of a few steps: every loss term of every step, and what the run folder records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from goldens import kit
from goldens.purify import batch

PAIRS = ("count=16", "shard=4", "steps=2", "answer_steps=1", "kinds=features,towards,words,answers", "seed=3")
SMALL = ("batch=2", "steps=3", "save_every=3", "warmup=2", "seed=5")
PEERS = ("hgd", "flowpure", "flowpure-gauss", "adbm", "codefend-r")
TIMES = {"seconds"}


def small_bank(folder: Path) -> Path:
    """A bank as ``codefend pairs`` leaves it, with 64 x 64 images drawn from a seed: trainings take seconds on it."""
    rng = np.random.default_rng(11)
    folder.mkdir(parents=True)
    rows = []
    for number, kind in enumerate(("features", "words")):
        coarse = rng.integers(20, 236, (4, 3, 8, 8), dtype=np.int16).repeat(8, 2).repeat(8, 3)
        attacked = coarse + rng.integers(-8, 9, coarse.shape, dtype=np.int16)
        tensors = {"clean": coarse.astype(np.uint8), "attacked": attacked.astype(np.uint8)}
        path = folder / f"pairs-{number:05d}.safetensors"
        save_file(tensors, path, metadata={"state": json.dumps({"kind": kind})})
        pairs = [{"eps": 8 / 255, "fall": 1.0}] * 4
        rows.append({"key": f"shard-{number}", "kind": kind, "target": "lite0", "steps": 2, "pairs": pairs})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.json").write_text(json.dumps({"pairs": True, "count": 8}))
    return folder


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run, without times."""
    lines = (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMES} for line in lines]


def described(run: Path) -> dict[str, Any]:
    """Curve, config and what the weights' folder holds."""
    weights = run / "weights"
    meta = json.loads((weights / "config.json").read_text())
    return {
        "rows": rows_of(run),
        "purified": purified(weights) if "kind" in meta else None,
        "config": sorted(json.loads((run / "config.json").read_text())),
        "weights": {"files": sorted(p.name for p in weights.iterdir()), "config": meta},
        "tensors": tensors_of(weights / "model.safetensors"),
    }


def purified(weights: Path) -> list[float]:
    """Mean and deviation of what the new weights make of the input."""
    import codefend

    with torch.no_grad():
        output = codefend.load_purifier(str(weights))(batch(), generator=torch.Generator().manual_seed(1))
    return [float(output.mean()), float(output.std())]


def tensors_of(path: Path) -> dict[str, Any]:
    """Number, names' hash and kinds of a weights file: what a loader must find there."""
    with safe_open(path, framework="numpy") as file:
        names = sorted(file.keys())
        kinds = sorted({str(file.get_tensor(name).dtype) for name in names})
    joined = np.frombuffer("\n".join(names).encode(), np.uint8)
    return {"count": len(names), "names": kit.digest(joined), "kinds": kinds}


def trained(place: Path, preset: str, *settings: str) -> dict[str, Any]:
    """``codefend train PRESET`` in ``place``."""
    arguments = ["train", preset, "--run", place, *(word for s in settings for word in ("--set", s))]
    with kit.deterministic():
        kit.run_well(*arguments)
        return described(place)


def bridge(place: Path) -> dict[str, Any]:
    """The shipped recipe's losses on a small bank: features, words, direction, identity; nothing mined."""
    bank = small_bank(place / "bank")
    return trained(place / "run", "bridge", f"pairs={bank}", *SMALL, "mined=0", "clean=0.5", "w_identity=2", "jpeg=0.3")


def prior(place: Path) -> dict[str, Any]:
    return trained(place / "run", "prior", *SMALL, "side=48", "net.channels=8,16,16", "net.blocks=1,1,1")


def pairs(place: Path) -> dict[str, Any]:
    """A bank of sixteen pairs, four of each kind, and the sums of its images."""
    with kit.deterministic():
        kit.run_well("pairs", "--run", place, *(word for s in PAIRS for word in ("--set", s)))
    shards = {}
    for path in sorted(place.glob("pairs-*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            clean, attacked = file.get_tensor("clean").astype(int), file.get_tensor("attacked").astype(int)
        change = np.abs(attacked - clean)
        shards[path.name] = {
            "shape": list(clean.shape),
            "clean": kit.digest(clean.astype(np.uint8)),
            "change": float(change.mean()),
            "most": [int(most) for most in change.reshape(len(change), -1).max(1)],
        }
    config = sorted(json.loads((place / "config.json").read_text()))
    return {"rows": rows_of(place), "config": config, "shards": shards}


def mined(place: Path) -> dict[str, Any]:
    """Bridges whose pairs are mined in the loop, on answers too, and replayed ones."""
    bank = small_bank(place / "bank")
    always = (f"pairs={bank}", *SMALL)
    answers = ("mined=1", "answers=0.5", "answers_batch=2", "w_answers=0.4", "lean=true", "eps_ramp=4")
    robust = (f"pairs={bank}", *SMALL, "prior=none", "answers=0", "mined_average=0.5")
    replayed = (f"pairs={bank}", "batch=4", "steps=4", "save_every=4", "replay=2", "answers=0", "mined=0.5", "seed=5")
    return {
        "answers": trained(place / "answers", "bridge", *always, *answers),
        "robust": trained(place / "robust", "bridge-robust", *robust),
        "replay": trained(place / "replay", "bridge-replay", *replayed),
    }


def peers(place: Path) -> dict[str, Any]:
    bank = small_bank(place / "bank")
    curves = {}
    for name in PEERS:
        banks = [] if name in ("flowpure-gauss", "adbm") else [f"pairs={bank}"]
        curves[name] = trained(place / name, name, *banks, "batch=2", "steps=2", "save_every=2", "seed=5")
    return curves


def pocket(place: Path) -> dict[str, Any]:
    """Two steps of instructions from a new connector; grounding of one epoch on few scenes."""
    torch.manual_seed(0)  # on 2026-11-29 the connector's initial weights were those of the process, not of the config
    grounding = ("grounding_scenes=64", "grounding_shapes=32", "grounding_epochs=1")
    return trained(place / "run", "pocket", "steps=2", "batch=1", "questions=2", "save_every=2", "rank=4", *grounding)
