"""Banks of pairs as Parquet with image columns, which `datasets` reads and displays.

``train-00000.parquet`` and so on: ``clean`` and ``attacked`` are PNG files in a struct of bytes and path; ``kind``,
``target``, ``eps``, ``fall`` (decrease of the objective) and ``steps`` describe the attack. One row group is one shard,
so that training can read it alone. ``datasets.load_dataset("parquet", data_dir=FOLDER, streaming=True)`` streams the
same rows.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from codefend.core import images
from codefend.core.assets import needs
from codefend.core.checkpoints import load_checkpoint
from codefend.core.files import write_atomic
from codefend.core.runs import read_rows
from codefend.types import CodefendError

SHARDS = 64  # shards a file
TEXTS, NUMBERS = ("kind", "target"), ("eps", "fall")


def write_table(bank: str | Path, folder: str | Path) -> Path:
    """Write a bank of `pairs.make_pairs` as Parquet into ``folder``, in place of an earlier one.

    Raises CodefendError when pyarrow is missing, or the bank holds no pairs or is incomplete.
    """
    pyarrow, parquet = _library()
    rows = [row for row in read_rows(bank) if "pairs" in row]
    paths = sorted(Path(bank).glob("pairs-*.safetensors"))
    if not paths or len(paths) != len(rows):
        raise CodefendError(
            f"{bank} holds {len(paths)} files of pairs, but {len(rows)} rows about them; run `codefend pairs` again"
        )
    rows.sort(key=lambda row: int(str(row["key"]).rpartition("-")[2]))
    written = set()
    for number, start in enumerate(range(0, len(paths), SHARDS)):
        stream, schema = io.BytesIO(), _schema(pyarrow)
        with parquet.ParquetWriter(stream, schema, compression="none") as writer:  # PNG is compressed
            for path, row in zip(paths[start : start + SHARDS], rows[start : start + SHARDS], strict=True):
                writer.write_table(pyarrow.Table.from_pylist(list(_records(path, row)), schema=schema))
        table = Path(folder) / f"train-{number:05d}.parquet"
        write_atomic(table, stream.getvalue())
        written.add(table)
    for old in set(Path(folder).glob(f"train-{'[0-9]' * 5}.parquet")) - written:  # of a larger bank before
        old.unlink()
    return Path(folder)


def _records(path: Path, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    tensors, _ = load_checkpoint(path)
    for index, pair in enumerate(row["pairs"]):
        record: dict[str, Any] = {key: row[key] for key in (*TEXTS, "steps")} | {key: pair[key] for key in NUMBERS}
        for side in ("clean", "attacked"):
            data = images.encode(tensors[side][index].float() / 255)
            record[side] = {"bytes": data, "path": f"{path.stem}-{index}-{side}.png"}
        yield record


def _features() -> dict[str, Any]:
    """The columns as `datasets` describes them."""
    values = {**dict.fromkeys(TEXTS, "string"), **dict.fromkeys(NUMBERS, "float32"), "steps": "int32"}
    features: dict[str, Any] = {side: {"_type": "Image"} for side in ("clean", "attacked")}
    return {**features, **{key: {"dtype": kind, "_type": "Value"} for key, kind in values.items()}}


def _schema(pyarrow: Any) -> Any:
    image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    fields = [(side, image) for side in ("clean", "attacked")]
    fields += [(key, pyarrow.string()) for key in TEXTS] + [(key, pyarrow.float32()) for key in NUMBERS]
    metadata = json.dumps({"info": {"features": _features()}})  # so that `datasets` decodes the images
    return pyarrow.schema([*fields, ("steps", pyarrow.int32())], metadata={"huggingface": metadata})


def group_sizes(path: str | Path) -> list[int]:
    """The number of pairs in each row group. Raises CodefendError for a file that isn't Parquet with both images."""
    meta = _open(path).metadata
    return [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]


def _open(path: str | Path) -> Any:
    _, parquet = _library()
    try:
        file = parquet.ParquetFile(path)
        names = set(file.schema_arrow.names)
    except Exception as error:  # pyarrow raises its own errors and OSError
        raise CodefendError(f"{path} is no Parquet file: {str(error).splitlines()[0]}") from error
    if not {"clean", "attacked"} <= names:
        raise CodefendError(f"{path} has no columns clean and attacked, but {', '.join(sorted(names))}")
    return file


def read_group(path: str | Path, group: int) -> tuple[Tensor, Tensor, str]:
    """``(clean, attacked, kind)`` of one row group, 8-bit ``[n, 3, H, W]``; the kind is that of its first pair.

    Raises CodefendError for images of several sizes.
    """
    return _stack(path, _rows(path, group))


def read_table(path: str | Path, *, without: Sequence[str] = ()) -> Iterator[tuple[Tensor, Tensor, str]]:
    """Yield `read_group` of each row group, without the pairs whose kind or target ``without`` names."""
    for group in range(len(group_sizes(path))):
        rows = [row for row in _rows(path, group) if not {row.get(key) for key in TEXTS} & set(without)]
        if rows:
            yield _stack(path, rows)


def _rows(path: str | Path, group: int) -> list[dict[str, Any]]:
    file = _open(path)
    columns = [name for name in ("clean", "attacked", *TEXTS) if name in file.schema_arrow.names]
    rows: list[dict[str, Any]] = file.read_row_group(group, columns=columns).to_pylist()
    return rows


def _stack(path: str | Path, rows: Sequence[dict[str, Any]]) -> tuple[Tensor, Tensor, str]:
    sides = [[_pixels(row[side]["bytes"]) for row in rows] for side in ("clean", "attacked")]
    if len({image.shape for side in sides for image in side}) > 1:
        raise CodefendError(f"{path}: images of several sizes in one row group; training needs one size")
    return torch.stack(sides[0]), torch.stack(sides[1]), str(rows[0].get("kind", ""))


class Description(NamedTuple):
    """The attack of a pair: "", None and nan where a table of another origin lacks a column."""

    kind: str = ""
    target: str = ""
    steps: int | None = None
    eps: float = float("nan")


def read_descriptions(folder: str | Path) -> list[Description]:
    """The description of every pair of a folder's tables."""
    descriptions = list[Description]()
    for path in sorted(Path(folder).glob("*.parquet")):
        file = _open(path)
        columns = [name for name in Description._fields if name in file.schema_arrow.names]
        rows = file.read(columns=columns).to_pylist() if columns else [{}] * file.metadata.num_rows
        descriptions += [Description(**row) for row in rows]
    return descriptions


def _pixels(data: bytes) -> Tensor:
    return (images.load(data).pixels * 255).round().to(torch.uint8)


def _library() -> tuple[Any, Any]:
    with needs("Parquet", "parquet"):
        return import_module("pyarrow"), import_module("pyarrow.parquet")
