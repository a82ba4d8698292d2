"""Trainings: each is a loss and batches for the one loop (`fit.fit`), and resumed by the same command."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from codefend.types import CodefendError


@runtime_checkable
class TrainingConfig(Protocol):
    """Settings of a training; they determine its weights."""

    def train(self, folder: str | Path) -> Path:
        """Train in the run folder ``folder`` and return the folder with the weights; the same call resumes."""
        ...


def train(config: Any, folder: str | Path, *, tracker: str = "") -> Path:
    """Run the training that ``config`` describes and return the folder with the weights.

    ``tracker`` also sends the rows to TensorBoard, wandb, MLflow and so on (`tracking`); it is not part of the config.
    Raises CodefendError when the config is not a training's or the tracker is not available, and as the training does.
    """
    from codefend.training.tracking import tracked

    if not isinstance(config, TrainingConfig):
        raise CodefendError(f"{type(config).__name__} is not a training; `codefend list presets` says which are")
    with tracked(tracker):
        return config.train(folder)
