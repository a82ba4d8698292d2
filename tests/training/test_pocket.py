"""The pocket's training resumes behind its last checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from codefend.core.checkpoints import load_checkpoint
from codefend.training import pocket, train

if TYPE_CHECKING:
    pass


def test_a_pocket_cut_short_behind_its_last_checkpoint_has_its_weights(
    tmp_path: Path, interrupt_saved: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Part:
        """The trainable part of a pocket."""

        device, config = torch.device("cpu"), {"encoder": "none"}

        def __init__(self, *_: object, **__: object) -> None:
            self.trainable = {"connector.scale": torch.nn.Parameter(torch.ones(()))}

        def to(self, device: torch.device) -> Part:
            return self

    def loss(part: Part, images: torch.Tensor, texts: object) -> tuple[torch.Tensor, float, float]:
        return part.trainable["connector.scale"].square(), 0.0, 0.0

    replaced = {
        "Pocket": Part,
        "load_shapes": list,
        "instruction_batch": lambda *_: (torch.zeros(1), []),
        "packed_loss": loss,
    }
    for name, value in replaced.items():
        monkeypatch.setattr(pocket, name, value)
    config = pocket.PocketConfig(steps=4, save_every=2, grounding_epochs=0, lr_connector=0.1, warmup=1)
    whole = train(config, tmp_path / "whole")
    interrupt_saved(lambda: train(config, tmp_path / "cut"), 4)
    scales = [
        load_checkpoint(f / "model.safetensors")[0]["connector.scale"] for f in (whole, train(config, tmp_path / "cut"))
    ]
    assert scales[0] == scales[1] < 0.9
