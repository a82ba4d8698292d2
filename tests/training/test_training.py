"""The loops resume exactly, write loadable weights, and descend; the bank keeps its budgets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from codefend.core.runs import load_checkpoint, open_run, read_rows, save_checkpoint
from codefend.encoders.views import View
from codefend.purifiers.nets import NetConfig, load_net
from codefend.training import pair_tables, pairs, pocket, train
from codefend.training.prior import PriorConfig, crops
from codefend.types import CodefendError

if TYPE_CHECKING:
    from codefend.victims.pocket import Pocket

pytest.importorskip("sklearn")
pytest.importorskip("skimage")

Interrupt = Callable[[Callable[[], object], int], None]
TINY = NetConfig(channels=(8, 12), blocks=(1, 1), embedding=16)


def prior_config(**changes: object) -> PriorConfig:
    values = {"net": TINY, "steps": 6, "batch": 2, "side": 32, "warmup": 2, "save_every": 2, **changes}
    return PriorConfig(**values)  # type: ignore[arg-type]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_net(folder)[0].state_dict()


def test_an_interrupted_prior_equals_an_uninterrupted_one(tmp_path: Path, interrupt: Interrupt) -> None:
    whole = train(prior_config(), tmp_path / "whole")
    interrupt(lambda: train(prior_config(), tmp_path / "cut"), 4)  # of which one in two is saved
    cut = train(prior_config(), tmp_path / "cut")
    assert all(torch.equal(a, weights(cut)[name]) for name, a in weights(whole).items())
    assert [row["step"] for row in read_rows(tmp_path / "cut")] == [1, 2, 3, 4, 5, 6]


def test_a_training_cut_short_behind_its_last_checkpoint_has_its_weights(
    tmp_path: Path, interrupt_saved: Callable[..., None]
) -> None:
    whole = train(prior_config(), tmp_path / "whole")
    interrupt_saved(lambda: train(prior_config(), tmp_path / "cut"), 6)
    cut = train(prior_config(), tmp_path / "cut")  # nothing is left to do
    assert all(torch.equal(a, weights(cut)[name]) for name, a in weights(whole).items())
    assert "6 of 6 steps" in (cut / "README.md").read_text()


def test_a_pocket_cut_short_behind_its_last_checkpoint_has_its_weights(
    tmp_path: Path, interrupt_saved: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Part:
        """What is trained of a pocket, without the rest."""

        device, config = torch.device("cpu"), {"encoder": "none"}

        def __init__(self, *_: object, **__: object) -> None:
            self.trainable = {"connector.scale": torch.nn.Parameter(torch.ones(()))}

        def to(self, device: torch.device) -> Part:
            return self

    def loss(part: Part, images: torch.Tensor, texts: object) -> tuple[torch.Tensor, float, float]:
        return part.trainable["connector.scale"].square(), 0.0, 0.0

    replaced = {"Pocket": Part, "load_shapes": list, "_batch": lambda *_: (torch.zeros(1), []), "packed_loss": loss}
    for name, value in replaced.items():
        monkeypatch.setattr(pocket, name, value)
    config = pocket.PocketConfig(steps=4, save_every=2, grounding_epochs=0, lr_connector=0.1, warmup=1)
    whole = train(config, tmp_path / "whole")
    interrupt_saved(lambda: train(config, tmp_path / "cut"), 4)
    scales = [
        load_checkpoint(f / "model.safetensors")[0]["connector.scale"] for f in (whole, train(config, tmp_path / "cut"))
    ]
    assert scales[0] == scales[1] < 0.9


def test_the_prior_learns(tmp_path: Path) -> None:
    train(prior_config(steps=60, batch=8, lr=4e-3, save_every=60), tmp_path)
    losses = [row["loss"] for row in read_rows(tmp_path)]
    assert np.mean(losses[-15:]) < 0.9 * np.mean(losses[:15])


def test_a_folder_of_another_config_is_refused(tmp_path: Path) -> None:
    train(prior_config(steps=2), tmp_path)
    with pytest.raises(CodefendError, match="steps"):
        train(prior_config(steps=3), tmp_path)


def test_what_is_no_training_is_told() -> None:
    with pytest.raises(CodefendError, match="not a training"):
        train(TINY, "nowhere")


def test_crops_are_windows_of_their_pictures() -> None:
    pictures = torch.arange(2 * 3 * 8 * 8, dtype=torch.float32).view(2, 3, 8, 8)
    windows = crops(pictures, 4, np.random.default_rng(0))
    for picture, window in zip(pictures, windows, strict=True):
        found = picture.unfold(1, 4, 1).unfold(2, 4, 1).permute(1, 2, 0, 3, 4).reshape(-1, 3, 4, 4)
        assert (found == window).flatten(1).all(1).any()


@pytest.mark.weights
def test_pairs_then_bridge(bare_pocket: Pocket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from codefend import victims
    from codefend.training import pairs
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

    prior = train(prior_config(steps=2), tmp_path / "prior")
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


def test_banks_of_different_seeds_share_no_scene() -> None:
    shards = range(300)
    for size in (32, 256):
        whole = [{pairs.first_scene(seed, s, size) + i for s in shards for i in range(size)} for seed in (0, 1, 99)]
        assert not whole[0] & whole[1]
        assert not whole[1] & whole[2]
        assert len(whole[0]) == 300 * size


@pytest.mark.weights
def test_a_bank_says_which_views_were_attacked(
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
    ("changes", "said"),
    [
        ({"shard": 6}, "multiple of 4"),
        ({"views": 1.5}, "from 0 to 1"),
        ({"views": 0.5, "encoders": ("victim",)}, "encoders by name"),
        ({"shares": (0.5, 0.5)}, "three that sum to 1"),
        ({"shares": (0.5, 0.6, -0.1)}, "three that sum to 1"),
    ],
)
def test_a_bank_that_cannot_be_made_is_told(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(CodefendError, match=said):
        pairs.PairsConfig(**changes)


def test_a_bank_without_pairs_is_told(tmp_path: Path) -> None:
    from codefend.training.pairs import read_pairs

    with pytest.raises(CodefendError, match="codefend pairs"):
        list(read_pairs(tmp_path))


def bank_of(folder: Path, targets: list[str]) -> Path:
    """Two pairs a shard, of noise."""
    with open_run(folder, {"targets": targets}) as run:
        for number, target in enumerate(targets):
            sides = {side: torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8) for side in ("clean", "attacked")}
            kind = "features" if number else "words"
            save_checkpoint(folder / f"pairs-{number:05d}.safetensors", sides, {"kind": kind})
            row = {"kind": kind, "target": target, "steps": 1, "pairs": [{"eps": 0.1, "fall": 0.1}] * 2}
            run.append({"key": f"shard-{number}", **row})
    return folder


@pytest.mark.parametrize("without", [("lite2",), ("words",), ("words", "lite0"), ("mine",), ("lite1",)])
def test_a_table_leaves_out_what_its_bank_does(tmp_path: Path, without: tuple[str, ...]) -> None:
    pytest.importorskip("pyarrow")
    bank = bank_of(tmp_path / "bank", ["mine", "lite0", "lite2", "lite2"])
    table = pair_tables.write_table(bank, tmp_path / "table")
    wanted, found = (list(pairs.read_pairs(place, without=without)) for place in (bank, table))
    assert [kind for *_, kind in wanted] == [kind for *_, kind in found]
    for first, second in zip(wanted, found, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first[:2], second[:2], strict=True))
    said = []
    for place in (bank, table):
        with pytest.raises(CodefendError, match="knows no 'liet2' to leave out") as caught:
            list(pairs.read_pairs(place, without=("liet2",)))
        said.append(str(caught.value).removeprefix(str(place)))
    assert said[0] == said[1]


def test_row_groups_that_others_made_are_sorted_pair_by_pair(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pair_tables.write_table(bank_of(tmp_path / "bank", ["lite0", "lite2"]), tmp_path / "table")
    path = table / "train-00000.parquet"
    parquet.write_table(parquet.read_table(path), path)  # all in one group
    ((clean, _, kind),) = pairs.read_pairs(table, without=("lite0",))
    assert (len(clean), kind) == (2, "features")


def test_a_smaller_table_leaves_nothing_of_a_larger_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyarrow")
    monkeypatch.setattr(pair_tables, "SHARDS", 1)
    large, small = (bank_of(tmp_path / str(count), ["lite0"] * count) for count in (3, 1))
    pair_tables.write_table(large, tmp_path / "table")
    (tmp_path / "table" / "train-of-mine.parquet").write_bytes(b"")
    pair_tables.write_table(small, tmp_path / "table")
    found = sorted(path.name for path in (tmp_path / "table").iterdir())
    assert found == ["train-00000.parquet", "train-of-mine.parquet"]
