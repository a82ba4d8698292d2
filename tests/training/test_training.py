"""Which configs are trainings."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from codefend.purifiers.nets import NetConfig
from codefend.training import train
from codefend.types import CodefendError

if TYPE_CHECKING:
    pass


def test_another_config_is_refused() -> None:
    with pytest.raises(CodefendError, match="not a training"):
        train(NetConfig(), "nowhere")
