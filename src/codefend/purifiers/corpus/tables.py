"""Parquet files with images as ``datasets`` stores them, ``struct<bytes: binary, path: string>``, or as binary."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import IO, Any

from codefend.core.assets import needs
from codefend.purifiers.corpus.stores import Store
from codefend.purifiers.corpus.unit_work import MAX_BYTES, UnitWork, UnreadableSource, reading
from codefend.purifiers.corpus.units import Unit
from codefend.purifiers.image_files import PurifiedFile
from codefend.types import CodefendError

_ROWS = 16  # read at a time
_GROUP_BYTES = 64 << 20  # of a row group that is written
_GROUP_ROWS = 1000


def check_columns(unit: Unit, wanted: str | None) -> None:
    """Raise CodefendError when a table has no column to purify. A table that cannot be read is not judged here."""
    pa, parquet = _arrow()
    with suppress(UnreadableSource), _opened(pa, parquet, unit) as table:
        image_columns(pa, table.schema_arrow, unit.name, wanted)


def purify_table(unit: Unit, work: UnitWork) -> dict[str, str]:
    """Write the table anew, its other columns and metadata unchanged; returns its hash by name.

    The image of a row that cannot be purified becomes null, with its reason in the rows of the manifest.
    Raises UnreadableSource for a damaged file and CodefendError for a column that holds no images.
    """
    pa, parquet = _arrow()
    with _opened(pa, parquet, unit) as table:
        columns = image_columns(pa, table.schema_arrow, unit.name, work.column)
        work.image_bytes = unit.size // max(1, table.metadata.num_rows * len(columns))  # a table is compressed

        def write(stream: IO[bytes]) -> None:
            with parquet.ParquetWriter(pa.PythonFile(stream, mode="w"), table.schema_arrow) as writer:
                groups, open_batches = _Groups(pa, writer), deque[_Batch]()
                for start, batch in _batches(pa, table, unit.name):
                    open_batches.append(_Batch(batch, columns))
                    open_batches[-1].purify(work, start)
                    while open_batches and not open_batches[0].calls:
                        groups.add(open_batches.popleft().purified(pa))
                work.finish()
                for rows in open_batches:
                    groups.add(rows.purified(pa))
                groups.flush()

        return {unit.name: work.sink.put(unit.name, write)}


@contextmanager
def _opened(pa: Any, parquet: Any, unit: Unit) -> Iterator[Any]:
    store, (name, entry) = Store(unit.source), unit.files[0]
    with reading(name):
        source = store.open(entry.path)
    with source:
        with reading(name, pa.ArrowException):
            table = parquet.ParquetFile(source, buffer_size=1 << 20, pre_buffer=False)
        yield table


def image_columns(pa: Any, schema: Any, name: str, wanted: str | None) -> list[str]:
    """The columns to purify: ``wanted``, or every one of the type that ``datasets`` gives images.

    Raises CodefendError, naming the columns, when there is none or ``wanted`` holds no images, and for lists of images
    when nothing is wanted: they would be carried through as they are.
    """
    lists = [field.name for field in schema if _is_image_list(pa, field.type)]
    if wanted is None and lists:
        raise CodefendError(f"{name} holds lists of images in {lists[0]!r}, which are not purified; drop that column")
    found = [field.name for field in schema if _is_image_struct(pa, field.type)]
    if wanted is None and found:
        return found
    known = ", ".join(f"{field.name}: {field.type}" for field in schema)[:300]
    if wanted is None:
        raise CodefendError(f"{name} has no image column (struct<bytes, path>); name a binary one: --column ({known})")
    if wanted not in schema.names:
        raise CodefendError(f"{name} has no column {wanted!r}; it has {known}")
    kind = schema.field(wanted).type
    if not (_is_image_struct(pa, kind) or _is_bytes(pa, kind)):
        raise CodefendError(f"column {wanted!r} of {name} holds {kind}, no images; it has {known}")
    return [wanted]


def _is_image_struct(pa: Any, kind: Any) -> bool:
    if not pa.types.is_struct(kind) or kind.num_fields != 2:
        return False
    fields = {field.name: field.type for field in (kind.field(0), kind.field(1))}
    return set(fields) == {"bytes", "path"} and _is_bytes(pa, fields["bytes"])


def _is_image_list(pa: Any, kind: Any) -> bool:
    tests = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(test(kind) for test in tests) and _is_image_struct(pa, kind.value_type)


def _is_bytes(pa: Any, kind: Any) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _batches(pa: Any, table: Any, name: str) -> Iterator[tuple[int, Any]]:
    """Record batches with the number of their first row."""
    start, batches = 0, table.iter_batches(batch_size=_ROWS)
    while True:
        with reading(name, pa.ArrowException):
            batch = next(batches, None)
        if batch is None:
            return
        yield start, batch
        start += batch.num_rows


class _Batch:
    """A record batch; its images are purified in calls of ``batch``, and null stays null."""

    def __init__(self, batch: Any, columns: Sequence[str]) -> None:
        self.batch = batch
        self.values = {name: batch.column(batch.schema.get_field_index(name)).to_pylist() for name in columns}
        self.calls = 0  # that are not done

    def purify(self, work: UnitWork, start: int) -> None:
        """Start on all images; the first row has the number ``start``."""
        size = work.options.batch
        for column, values in self.values.items():
            todo = list(self._files(work, f"{column}:", start, values))
            for part in (todo[first : first + size] for first in range(0, len(todo), size)):
                self.calls += 1
                places, names, files = zip(*part, strict=True)
                work.purify(files, partial(self._fill, values, places), names)

    def _files(
        self, work: UnitWork, prefix: str, start: int, values: list[Any]
    ) -> Iterator[tuple[int, str, tuple[str, bytes]]]:
        for place, value in enumerate(values):
            data, path = (value["bytes"], value["path"]) if isinstance(value, dict) else (value, None)
            row = f"{prefix}{start + place}"
            if data is not None and len(data) <= MAX_BYTES:
                yield place, row, (path or "image", data)
            elif value is not None:
                work.fail(
                    row, "the row names a file and holds no bytes" if data is None else f"over {MAX_BYTES:,} bytes"
                )
                values[place] = None

    def _fill(self, values: list[Any], places: Sequence[int], results: Sequence[PurifiedFile]) -> None:
        for place, result in zip(places, results, strict=True):
            values[place] = _value(values[place], result)
        self.calls -= 1

    def purified(self, pa: Any) -> Any:
        batch = self.batch
        for column, values in self.values.items():
            index = batch.schema.get_field_index(column)
            field = batch.schema.field(index)
            batch = batch.set_column(index, field, pa.array(values, type=field.type))
        return batch


def _value(before: Any, result: PurifiedFile) -> Any:
    if result.error:
        return None
    if not isinstance(before, dict):
        return result.data
    return {"bytes": result.data, "path": before["path"] and result.target}


class _Groups:
    """Row groups of a table, bounded in rows and bytes, whatever those of the source were."""

    def __init__(self, pa: Any, writer: Any) -> None:
        self.pa, self.writer = pa, writer
        self.batches: list[Any] = []
        self.rows = self.size = 0

    def add(self, batch: Any) -> None:
        self.batches.append(batch)
        self.rows += batch.num_rows
        self.size += batch.nbytes
        if self.rows >= _GROUP_ROWS or self.size >= _GROUP_BYTES:
            self.flush()

    def flush(self) -> None:
        if self.batches:
            self.writer.write_table(self.pa.Table.from_batches(self.batches))
        self.batches, self.rows, self.size = [], 0, 0


def _arrow() -> tuple[Any, Any]:
    with needs("Parquet", "parquet"):
        import pyarrow
        import pyarrow.parquet
    return pyarrow, pyarrow.parquet
