"""Shared fixtures. Two threads in all: the machine that this must be quick on has two cores."""

from __future__ import annotations

import os

import pytest
import torch

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


@pytest.fixture(scope="session")
def bare_pocket():  # type: ignore[no-untyped-def]
    """A pocket with pretrained parts and an untrained connector: loads in seconds, answers nonsense."""
    pytest.importorskip("transformers")
    from codefend.types import UserError
    from codefend.victims.pocket import Pocket

    torch.manual_seed(0)
    try:
        return Pocket("lite0", rank=4)
    except UserError as error:
        pytest.skip(str(error))
