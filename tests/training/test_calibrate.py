"""The fit of the detection score. Calibration of whole weights: tests/purifiers/test_detection.py."""

from __future__ import annotations

import torch

from codefend.training.calibrate import fit_logistic


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_fit_is_the_optimum_with_balanced_classes() -> None:
    clean = torch.randn(300, 4, generator=generator(), dtype=torch.float64) * torch.tensor([1.0, 0.1, 2.0, 1.0])
    attacked = torch.randn(200, 4, generator=generator(1), dtype=torch.float64) + torch.tensor([1.0, 0.0, -1.0, 0.5])
    weights, bias = fit_logistic(clean, attacked, ridge=1e-9)
    parameters = torch.tensor([*weights, bias], dtype=torch.float64, requires_grad=True)
    logits = [part @ parameters[:-1] + parameters[-1] for part in (clean, attacked)]
    loss = torch.nn.functional.softplus(logits[0]).mean() + torch.nn.functional.softplus(-logits[1]).mean()
    loss.backward()
    assert parameters.grad is not None
    assert float(parameters.grad.abs().max()) < 1e-5
    assert weights[0] > 0.5


def test_separable_classes_have_a_finite_fit() -> None:
    clean, attacked = torch.randn(40, 4, generator=generator()), 9 + torch.randn(40, 4, generator=generator(1))
    weights, bias = fit_logistic(clean, attacked)
    assert all(abs(weight) < 100 for weight in (*weights, bias))
    scores = [(part @ part.new_tensor(weights) + bias).sigmoid() for part in (clean, attacked)]
    assert float(scores[0].max()) < 0.5 < float(scores[1].min())
