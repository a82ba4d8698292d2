"""The training loops: one flat function each, resumable by the same command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from codefend.types import CodefendError


def train(config: Any, folder: str | Path, *, tracker: str = "") -> Path:
    """Run the loop that ``config`` belongs to and return the folder with the weights.

    ``tracker`` also shows the rows in TensorBoard, wandb, MLflow and so on (`tracking`); it is no part of the config.
    Raises CodefendError when the config is not a training's, for a tracker that cannot be had, or as the loop does.
    """
    from codefend.training.tracking import tracked

    with tracked(tracker):
        return _loop(config, folder)


def _loop(config: Any, folder: str | Path) -> Path:
    from codefend.contrib.backbones.training import TuneConfig, train_backbone
    from codefend.contrib.fare import FareConfig, train_fare
    from codefend.contrib.peers.training import PeerConfig, train_peer
    from codefend.training.bridge import BridgeConfig, train_bridge
    from codefend.training.pocket import PocketConfig, train_pocket
    from codefend.training.prior import PriorConfig, train_prior

    match config:
        case PocketConfig():
            return train_pocket(config, folder)
        case PriorConfig():
            return train_prior(config, folder)
        case BridgeConfig():
            return train_bridge(config, folder)
        case PeerConfig():
            return train_peer(config, folder)
        case FareConfig():
            return train_fare(config, folder)
        case TuneConfig():
            return train_backbone(config, folder)
    raise CodefendError(f"{type(config).__name__} is not a training; `codefend list presets` says which are")
