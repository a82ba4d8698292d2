"""Random gradient-free attack."""

from __future__ import annotations

import pytest

from codefend.contrib.attacks.rgf import rounds


@pytest.mark.parametrize(("queries", "expected"), [(800, (8, 100)), (5000, (50, 100)), (80, (8, 10)), (1, (1, 2))])
def test_rounds_split_the_queries(queries: int, expected: tuple[int, int]) -> None:
    assert rounds(queries, 100) == expected
