"""A small prior and small banks of pairs for the tests of trainings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from codefend.cli.presets import PRESETS
from codefend.core import runs
from codefend.core.checkpoints import save_checkpoint
from codefend.core.settings import known_keys
from codefend.purifiers.nets import NetConfig, PurifierNet, load_net, save_net


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small_prior(folder: Path) -> Path:
    torch.manual_seed(0)
    save_net(folder, PurifierNet(NetConfig(channels=(6, 8), blocks=(1, 1), embedding=16)), kind="prior")
    return folder


def small_bank(folder: Path) -> Path:
    """Eight pairs of 128 pixels, half of them "features" on lite2 and half "words" on the pocket."""
    run = runs.open_run(folder, {"pairs": True, "steps": 3, "encoders": ["lite2"]})
    for shard, (kind, target) in enumerate([("features", "lite2"), ("words", "pocket")]):
        clean = torch.rand(4, 3, 128, 128, generator=generator(shard))
        attacked = clean + (shard + 1) * 4 / 255 * torch.randn(clean.shape, generator=generator(9)).sign()
        pair = {"clean": clean, "attacked": attacked.clamp(0, 1)}
        tensors = {name: (value * 255).round().to(torch.uint8) for name, value in pair.items()}
        save_checkpoint(run.dir / f"pairs-{shard:05d}.safetensors", tensors, {"kind": kind})
        pairs = [{"eps": (shard + 1) * 4 / 255, "fall": 1.0}] * 4
        run.append({"key": f"shard-{shard}", "kind": kind, "target": target, "steps": 3, "pairs": pairs})
    run.close()
    return folder


def peer_config(name: str, prior: Path, pairs: str | Path, **changes: Any) -> Any:
    """The preset ``name`` for two short steps, with the settings that it has."""
    settings = {"prior": prior, "pairs": pairs, "encoders": "lite0", "steps": 2, "batch": 2, "save_every": 1, **changes}
    known = known_keys(PRESETS[name].build({}))
    return PRESETS[name].build({key: str(value) for key, value in settings.items() if key in known})


def parameters(folder: Path) -> torch.Tensor:
    """All parameters of a saved network as one vector."""
    return torch.cat([value.flatten() for value in load_net(folder)[0].state_dict().values()])
