"""Banks as Parquet: what is left out, row groups of other origin, and replacement."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from codefend.core.checkpoints import save_checkpoint
from codefend.core.runs import open_run
from codefend.training import pair_tables, pairs
from codefend.types import CodefendError

if TYPE_CHECKING:
    pass


def bank_of(folder: Path, targets: list[str]) -> Path:
    """A bank with two pairs of noise in each shard."""
    with open_run(folder, {"targets": targets}) as run:
        for number, target in enumerate(targets):
            sides = {side: torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8) for side in ("clean", "attacked")}
            kind = "features" if number else "words"
            save_checkpoint(folder / f"pairs-{number:05d}.safetensors", sides, {"kind": kind})
            row = {"kind": kind, "target": target, "steps": 1, "pairs": [{"eps": 0.1, "fall": 0.1}] * 2}
            run.append({"key": f"shard-{number}", **row})
    return folder


@pytest.mark.parametrize("without", [("lite2",), ("words",), ("words", "lite0"), ("mine",), ("lite1",)])
def test_a_table_leaves_out_the_same_pairs_as_its_bank(tmp_path: Path, without: tuple[str, ...]) -> None:
    bank = bank_of(tmp_path / "bank", ["mine", "lite0", "lite2", "lite2"])
    table = pair_tables.write_table(bank, tmp_path / "table")
    expected, actual = (list(pairs.read_pairs(folder, without=without)) for folder in (bank, table))
    assert [kind for *_, kind in expected] == [kind for *_, kind in actual]
    for first, second in zip(expected, actual, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first[:2], second[:2], strict=True))
    messages = []
    for folder in (bank, table):
        with pytest.raises(CodefendError, match="knows no 'liet2' to leave out") as caught:
            list(pairs.read_pairs(folder, without=("liet2",)))
        messages.append(str(caught.value).removeprefix(str(folder)))
    assert messages[0] == messages[1]


def test_pairs_of_several_kinds_in_one_row_group_are_filtered_one_by_one(tmp_path: Path) -> None:
    from pyarrow import parquet

    table = pair_tables.write_table(bank_of(tmp_path / "bank", ["lite0", "lite2"]), tmp_path / "table")
    path = table / "train-00000.parquet"
    parquet.write_table(parquet.read_table(path), path)  # all in one group
    ((clean, _, kind),) = pairs.read_pairs(table, without=("lite0",))
    assert (len(clean), kind) == (2, "features")


def test_a_smaller_table_replaces_a_larger_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair_tables, "SHARDS", 1)
    large, small = (bank_of(tmp_path / str(count), ["lite0"] * count) for count in (3, 1))
    pair_tables.write_table(large, tmp_path / "table")
    (tmp_path / "table" / "train-of-mine.parquet").write_bytes(b"")
    pair_tables.write_table(small, tmp_path / "table")
    names = sorted(path.name for path in (tmp_path / "table").iterdir())
    assert names == ["train-00000.parquet", "train-of-mine.parquet"]
