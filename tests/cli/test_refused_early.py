"""A run folder of another config is refused before a model, task or purifier is loaded, which takes many seconds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from codefend.bench import PhotographsConfig, evaluate
from codefend.contrib.peers.flowpure import FlowPureConfig
from codefend.core.runs import open_run
from codefend.training import train
from codefend.training.bridge import BridgeConfig
from codefend.training.pairs import PairsConfig, make_pairs
from codefend.training.pocket import PocketConfig
from codefend.training.prompt_search import optimize_prompt
from codefend.training.prompt_search.bank import SearchLoaders
from codefend.training.prompt_search.config import SearchConfig
from codefend.training.prompt_search.table import TableConfig, make_table
from codefend.types import CodefendError
from evaluate_kit import SMALL


class Loaded(Exception):
    """A heavy model would have been loaded."""


def load(*_: Any, **__: Any) -> Any:
    raise Loaded


LOADERS = SearchLoaders(victim=load, task=load, purifier=load)
VERBS: dict[str, Callable[[Path], object]] = {
    "pairs": lambda folder: make_pairs(PairsConfig(), folder),
    "eval": lambda folder: evaluate(SMALL, folder, loaders=LOADERS),
    "optimize-prompt": lambda folder: optimize_prompt(SearchConfig(), folder, loaders=LOADERS),
    "photographs": lambda folder: evaluate(PhotographsConfig(), folder),
    "train pocket": lambda folder: train(PocketConfig(), folder),
    "train bridge": lambda folder: train(BridgeConfig(), folder),
    "train peer": lambda folder: train(FlowPureConfig(), folder),
    "prompts table": lambda folder: make_table(TableConfig(), folder, loaders=LOADERS),
}


@pytest.fixture(autouse=True)
def _nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("codefend.victims.load_white_box", load)
    monkeypatch.setattr("codefend.tasks.photographs.load_all", load)
    monkeypatch.setattr("codefend.training.pocket.Pocket", load)
    monkeypatch.setattr("codefend.training.bridge.open_bank", load)
    monkeypatch.setattr("codefend.contrib.peers.base.Bank", load)


@pytest.mark.parametrize("verb", VERBS)
def test_another_config_is_refused_before_anything_is_loaded(tmp_path: Path, verb: str) -> None:
    open_run(tmp_path, {"another": 1}).close()
    with pytest.raises(CodefendError, match="holds a run with another config"):
        VERBS[verb](tmp_path)


@pytest.mark.parametrize("verb", VERBS)
def test_a_new_folder_is_created_after_loading(tmp_path: Path, verb: str) -> None:
    with pytest.raises(Loaded):
        VERBS[verb](tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_an_invalid_setting_is_reported_before_the_folder(tmp_path: Path) -> None:
    open_run(tmp_path, {"another": 1}).close()
    with pytest.raises(CodefendError, match="batch"):
        evaluate(replace(SMALL, batch=0), tmp_path, loaders=LOADERS)
