"""Banks of pairs: budgets, seeds, views, and a bridge trained on one."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from codefend.core.runs import read_rows
from codefend.encoders.views import View
from codefend.purifiers.nets import load_net
from codefend.training import pairs, train
from codefend.types import CodefendError
from training_kit import small_prior

if TYPE_CHECKING:
    from codefend.victims.pocket import Pocket


@pytest.mark.weights
def test_pairs_then_bridge(bare_pocket: Pocket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from codefend import victims
    from codefend.training.bridge import BridgeConfig

    monkeypatch.setattr(victims, "load", lambda name: bare_pocket)
    config = pairs.PairsConfig(encoders=("lite0",), count=16, kinds=("features", "words"), steps=2, shard=8)
    bank = pairs.make_pairs(config, tmp_path / "pairs")
    before = (bank / "rows.jsonl").read_text()
    pairs.make_pairs(config, bank)
    assert (bank / "rows.jsonl").read_text() == before  # a finished bank is left alone
    rows = read_rows(bank)
    shards = list(pairs.read_pairs(bank))
    assert [row["kind"] for row in rows] == [kind for _, _, kind in shards] == ["features", "words"]
    for (clean, attacked, _), row in zip(shards, rows, strict=True):
        reach = (clean.int() - attacked.int()).abs().flatten(1).amax(1)
        assert all(r <= 255 * pair["eps"] + 1e-3 for r, pair in zip(reach.tolist(), row["pairs"], strict=True))
        assert np.mean([pair["fall"] for pair in row["pairs"]]) > 0.05  # the attacks work

    prior = small_prior(tmp_path / "prior")
    bridge = BridgeConfig(
        pairs=(str(bank),),
        prior=str(prior),
        encoders=("lite0",),
        steps=2,
        batch=4,
        mined=0.5,
        mining_steps=1,
        save_every=1,
    )
    folder = train(bridge, tmp_path / "bridge")
    assert load_net(folder)[1]["kind"] == "bridge"
    assert all(
        row[term] >= 0
        for row in read_rows(tmp_path / "bridge")
        for term in ("bridge", "features", "words", "direction")
    )


def fork_pool(workers: int, start: Callable[..., None], *arguments: object) -> ProcessPoolExecutor:
    """Processes that inherit what a test has replaced."""
    return ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), start, arguments)


@pytest.mark.weights
def test_two_processes_make_the_bank_of_one(
    bare_pocket: Pocket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from codefend import victims

    monkeypatch.setattr(victims, "load", lambda name: bare_pocket)
    kinds = ("features", "words")
    config = pairs.PairsConfig(encoders=("lite0",), count=8, kinds=kinds, steps=1, shard=4)
    whole = contents(pairs.make_pairs(config, tmp_path / "one"))
    assert contents(pairs.make_pairs(config, tmp_path / "two", workers=2, pool=fork_pool)) == whole
    rows = tmp_path / "two" / "rows.jsonl"
    rows.write_bytes(b"".join(rows.read_bytes().splitlines(keepends=True)[:1]))  # as after a kill
    assert contents(pairs.make_pairs(config, tmp_path / "two", workers=2, pool=fork_pool)) == whole


def contents(bank: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in bank.iterdir() if path.name.startswith(("rows", "pairs"))}


def kill_oneself(config: pairs.PairsConfig) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.weights
def test_a_killed_process_ends_the_command_in_one_line(
    bare_pocket: Pocket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from codefend import victims

    monkeypatch.setattr(victims, "load", lambda name: bare_pocket)
    monkeypatch.setattr(pairs, "_start", kill_oneself)
    config = pairs.PairsConfig(encoders=("lite0",), count=12, kinds=("features",), shard=4)
    with pytest.raises(CodefendError, match="a worker process was killed"):
        pairs.make_pairs(config, tmp_path, workers=2, pool=fork_pool)
    assert not read_rows(tmp_path)


def test_banks_of_different_seeds_share_no_scene() -> None:
    shards = range(300)
    for size in (32, 256):
        whole = [{pairs.first_scene(seed, s, size) + i for s in shards for i in range(size)} for seed in (0, 1, 99)]
        assert not whole[0] & whole[1]
        assert not whole[1] & whole[2]
        assert len(whole[0]) == 300 * size


@pytest.mark.weights
def test_a_bank_records_the_views_that_were_attacked(
    bare_pocket: Pocket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from codefend import victims

    monkeypatch.setattr(victims, "load", lambda name: bare_pocket)
    monkeypatch.setattr(pairs, "draw_view", lambda rng: View(96, quarters=1))
    config = pairs.PairsConfig(encoders=("lite0",), count=24, kinds=("features", "words"), steps=2, shard=8, views=1.0)
    rows = read_rows(pairs.make_pairs(config, tmp_path))
    assert [row.get("view") for row in rows] == [asdict(View(96, quarters=1)), None, asdict(View(96, quarters=1))]
    assert all(np.mean([pair["fall"] for pair in row["pairs"]]) > 0.05 for row in rows)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 0}, "count must be above 0"),
        ({"shard": 6}, "multiple of 4"),
        ({"views": 1.5}, "from 0 to 1"),
        ({"views": 0.5, "encoders": ("victim",)}, "encoders by name"),
        ({"shares": (0.5, 0.5)}, "three that sum to 1"),
        ({"shares": (0.5, 0.6, -0.1)}, "three that sum to 1"),
    ],
)
def test_settings_that_no_bank_can_have_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CodefendError, match=message):
        pairs.PairsConfig(**changes)


def test_a_folder_without_pairs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CodefendError, match="codefend pairs"):
        list(pairs.read_pairs(tmp_path))
