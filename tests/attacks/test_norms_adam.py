"""Adam's update."""

from __future__ import annotations

import torch

from codefend.attacks.norms import Adam


def test_adam_follows_the_papers_formulas() -> None:
    adam, g1, g2 = Adam(), torch.tensor([2.0, -1e-9]), torch.tensor([-1.0, 3e-9])
    assert torch.allclose(adam(g1), torch.tensor([1.0, -1.0]), atol=1e-2)  # the bias correction makes it a sign
    mean = (0.9 * 0.1 * g1 + 0.1 * g2) / (1 - 0.9**2)
    square = (0.999 * 0.001 * g1**2 + 0.001 * g2**2) / (1 - 0.999**2)
    assert torch.allclose(adam(g2), mean / square.sqrt(), atol=1e-2)
