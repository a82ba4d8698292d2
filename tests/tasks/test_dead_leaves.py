"""Dead leaves: scales, seeds, and the file of canvases."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from codefend.tasks import dead_leaves


def test_a_canvas_has_edges_at_all_scales_and_repeats_from_its_seed() -> None:
    photograph = torch.rand(3, 200, 200, generator=torch.Generator().manual_seed(0))
    image, again = (dead_leaves.draw_canvas(np.random.default_rng(1), [photograph]) for _ in range(2))
    assert image.shape == (3, dead_leaves.SIDE, dead_leaves.SIDE)
    assert torch.equal(image, again)
    assert float(image.min()) >= 0
    assert float(image.max()) <= 1
    for scale in (1, 4, 16, 64):
        small = F.avg_pool2d(image, scale)
        assert float((small[:, 1:] - small[:, :-1]).abs().mean()) > 0.005, scale


def test_canvases_are_read_from_their_file_and_drawn_anew_for_another_count(tmp_path: Path) -> None:
    path = tmp_path / "new" / "canvases.safetensors"
    first = dead_leaves.load_canvases(path, 1, seed=3)
    stamp = path.stat().st_mtime_ns
    assert torch.equal(dead_leaves.load_canvases(path, 1, seed=3), first)
    assert path.stat().st_mtime_ns == stamp
    more = dead_leaves.load_canvases(path, 2, seed=3)
    assert torch.equal(more[:1], first)
    assert len(more) == 2
