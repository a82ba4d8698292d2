"""Banks of pairs as a standard data set: Parquet with image columns, as `datasets` reads and shows it.

``train-00000.parquet`` and so on: ``clean`` and ``attacked`` are PNG files in a struct of bytes and path, ``kind``,
``target``, ``eps``, ``fall`` and ``steps`` say how a pair was made. One row group is one shard, so that training
reads any of them alone. ``datasets.load_dataset("parquet", data_dir=FOLDER, streaming=True)`` streams the same rows.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from codefend.core import images
from codefend.core.files import write_atomic
from codefend.core.runs import load_checkpoint, read_rows
from codefend.types import CodefendError

SHARDS = 64  # shards a file
TEXTS, NUMBERS = ("kind", "target"), ("eps", "fall")


def write_table(bank: str | Path, folder: str | Path) -> Path:
    """Write the bank that `pairs.make_pairs` made as Parquet into ``folder``, instead of one that was there.

    Raises CodefendError when pyarrow is missing, or the bank holds no pairs, or fewer than its rows say.
    """
    pyarrow, parquet = _library()
    rows = [row for row in read_rows(bank) if "pairs" in row]
    paths = sorted(Path(bank).glob("pairs-*.safetensors"))
    if not paths or len(paths) != len(rows):
        raise CodefendError(f"{bank} holds {len(paths)} files of pairs, but {len(rows)} rows about them; make it whole")
    rows.sort(key=lambda row: int(str(row["key"]).rpartition("-")[2]))
    written = set()
    for number, start in enumerate(range(0, len(paths), SHARDS)):
        stream, schema = io.BytesIO(), _schema(pyarrow)
        with parquet.ParquetWriter(stream, schema, compression="none") as writer:  # PNG is compressed already
            for path, row in zip(paths[start : start + SHARDS], rows[start : start + SHARDS], strict=True):
                writer.write_table(pyarrow.Table.from_pylist(list(_records(path, row)), schema=schema))
        table = Path(folder) / f"train-{number:05d}.parquet"
        write_atomic(table, stream.getvalue())
        written.add(table)
    for old in set(Path(folder).glob(f"train-{'[0-9]' * 5}.parquet")) - written:  # of a larger bank
        old.unlink()
    return Path(folder)


def _records(path: Path, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    tensors, _ = load_checkpoint(path)
    for index, made in enumerate(row["pairs"]):
        record: dict[str, Any] = {key: row[key] for key in (*TEXTS, "steps")} | {key: made[key] for key in NUMBERS}
        for side in ("clean", "attacked"):
            data = images.encode(tensors[side][index].float() / 255)
            record[side] = {"bytes": data, "path": f"{path.stem}-{index}-{side}.png"}
        yield record


def _records_schema() -> dict[str, Any]:
    values = {**dict.fromkeys(TEXTS, "string"), **dict.fromkeys(NUMBERS, "float32"), "steps": "int32"}
    features: dict[str, Any] = {side: {"_type": "Image"} for side in ("clean", "attacked")}
    return {**features, **{key: {"dtype": kind, "_type": "Value"} for key, kind in values.items()}}


def _schema(pyarrow: Any) -> Any:
    picture = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    fields = [(side, picture) for side in ("clean", "attacked")]
    fields += [(key, pyarrow.string()) for key in TEXTS] + [(key, pyarrow.float32()) for key in NUMBERS]
    notes = json.dumps({"info": {"features": _records_schema()}})  # how `datasets` knows a picture from a struct
    return pyarrow.schema([*fields, ("steps", pyarrow.int32())], metadata={"huggingface": notes})


def groups(path: str | Path) -> list[int]:
    """How many pairs each row group holds. Raises CodefendError for a file that isn't Parquet with both pictures."""
    meta = _opened(path).metadata
    return [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]


def _opened(path: str | Path) -> Any:
    _, parquet = _library()
    try:
        file = parquet.ParquetFile(path)
        names = set(file.schema_arrow.names)
    except Exception as error:  # pyarrow raises its own and OSError
        raise CodefendError(f"{path} is no Parquet file: {str(error).splitlines()[0]}") from error
    if not {"clean", "attacked"} <= names:
        raise CodefendError(f"{path} has no columns clean and attacked, but {', '.join(sorted(names))}")
    return file


def read_group(path: str | Path, group: int) -> tuple[Tensor, Tensor, str]:
    """``(clean, attacked, kind)`` of one row group, 8-bit ``[n, 3, H, W]``; the kind of its first pair.

    Raises CodefendError when its pictures are not all of one size.
    """
    return _stacked(path, _rows(path, group))


def read_table(path: str | Path, *, without: Sequence[str] = ()) -> Iterator[tuple[Tensor, Tensor, str]]:
    """What ``read_group`` returns, of each row group, leaving out pairs whose kind or target ``without`` names."""
    for group in range(len(groups(path))):
        rows = [row for row in _rows(path, group) if not {row.get(key) for key in TEXTS} & set(without)]
        if rows:
            yield _stacked(path, rows)


def _rows(path: str | Path, group: int) -> list[dict[str, Any]]:
    file = _opened(path)
    wanted = [name for name in ("clean", "attacked", *TEXTS) if name in file.schema_arrow.names]
    rows: list[dict[str, Any]] = file.read_row_group(group, columns=wanted).to_pylist()
    return rows


def _stacked(path: str | Path, rows: Sequence[dict[str, Any]]) -> tuple[Tensor, Tensor, str]:
    sides = [[_pixels(row[side]["bytes"]) for row in rows] for side in ("clean", "attacked")]
    if len({picture.shape for side in sides for picture in side}) > 1:
        raise CodefendError(f"{path}: pictures of several sizes in one row group; training needs one size")
    return torch.stack(sides[0]), torch.stack(sides[1]), str(rows[0].get("kind", ""))


def described(folder: str | Path) -> list[tuple[str, str, int | None, float]]:
    """Kind, target, steps and eps of every pair of a folder's tables.

    "", None and nan where a table, made elsewhere, lacks them.
    """
    found: list[tuple[str, str, int | None, float]] = []
    for path in sorted(Path(folder).glob("*.parquet")):
        file = _opened(path)
        wanted = [name for name in ("kind", "target", "steps", "eps") if name in file.schema_arrow.names]
        rows = file.read(columns=wanted).to_pylist() if wanted else [{}] * file.metadata.num_rows
        found += [(r.get("kind", ""), r.get("target", ""), r.get("steps"), r.get("eps", float("nan"))) for r in rows]
    return found


def _pixels(data: bytes) -> Tensor:
    return (images.load(data).pixels * 255).round().to(torch.uint8)


def _library() -> tuple[Any, Any]:
    try:
        return import_module("pyarrow"), import_module("pyarrow.parquet")
    except ModuleNotFoundError as error:
        raise CodefendError("Parquet needs pyarrow: pip install 'codefend[parquet]'") from error
