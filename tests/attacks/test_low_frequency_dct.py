"""The cosine transform."""

from __future__ import annotations

import torch

from codefend.attacks.low_frequency import dct_matrix


def test_the_matrix_is_orthonormal_and_maps_a_cosine_to_one_coefficient() -> None:
    matrix = dct_matrix(8, torch.zeros(1, dtype=torch.float64))
    assert torch.allclose(matrix @ matrix.T, torch.eye(8, dtype=torch.float64), atol=1e-12)
    wave = torch.cos(torch.pi / 8 * (torch.arange(8).double() + 0.5) * 3)
    assert torch.allclose(matrix @ wave, 2 * torch.eye(8, dtype=torch.float64)[3], atol=1e-12)
