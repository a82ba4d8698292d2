"""Drawing from banks: what is left out, and banks in other processes."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from codefend.training.banks import Bank, StreamedBank
from codefend.types import CodefendError
from training_kit import small_bank


@pytest.fixture
def bank(tmp_path: Path) -> Path:
    return small_bank(tmp_path / "bank")


def test_kinds_and_targets_can_be_left_out_of_a_bank(bank: Path) -> None:
    assert len(Bank([str(bank)]).clean) == 8
    rest = Bank([str(bank)], without=("words",))
    assert len(rest.clean) == 4
    assert int((rest.clean.int() - rest.attacked.int()).abs().amax()) == 4
    assert int((Bank([str(bank)], without=("lite2",)).attacked.int() - rest.clean.int()).abs().amax()) > 8
    assert len(Bank([str(bank)], without=("lite1",)).clean) == 8  # an encoder that it never attacked
    with pytest.raises(CodefendError, match="knows no 'light'"):
        Bank([str(bank)], without=("light",))
    with pytest.raises(CodefendError, match="no pairs are left"):
        Bank([str(bank)], without=("words", "lite2"))


def test_a_streamed_bank_can_be_sent_to_another_process(bank: Path) -> None:
    streamed = StreamedBank([str(bank)])
    drawn = streamed.draw(np.random.default_rng(0), 4)
    assert len(pickle.dumps(streamed)) < 2000  # without the shards that were read
    again = copy.copy(streamed).draw(np.random.default_rng(0), 4)  # by the same two methods
    assert all(torch.equal(a, b) for a, b in zip(drawn, again, strict=True))
