"""Groups of files: images are purified, other files copied."""

from __future__ import annotations

import shutil
from typing import IO

from codefend.core.signatures import HEAD, is_image
from codefend.purifiers.corpus.stores import Entry, Store
from codefend.purifiers.corpus.unit_work import MAX_BYTES, UnitWork, UnreadableSource, reading
from codefend.purifiers.corpus.units import Unit
from codefend.purifiers.image_files import PurifiedFile, is_image_name, target_name


def purify_group(unit: Unit, work: UnitWork) -> dict[str, str]:
    """Write the files of a group; each is an output of its own, noted in the rows. Returns no other outputs."""
    store = Store(unit.source)
    waiting: list[tuple[str, bytes]] = []
    reserved = False
    for name, entry in unit.files:
        if not (is_image_name(name) or is_image(_content(store, name, entry, HEAD))):
            _copy(store, name, entry, work)
            continue
        if not is_image_name(name) and not reserved:
            reserved = True
            _reserve_targets(store, name, entry, work)
        try:
            waiting.append((name, _content(store, name, entry)))
        except UnreadableSource as error:
            work.fail(name, str(error))
        if len(waiting) >= work.options.batch:
            _flush(waiting, work)
            waiting = []
    _flush(waiting, work)
    work.finish()
    return {}


def _reserve_targets(store: Store, name: str, entry: Entry, work: UnitWork) -> None:
    """Reserve the outputs of the images in the folder of ``name``, also of those in other groups."""
    inner = name[: len(name) - len(entry.path.rpartition("/")[2])]
    for path in (other.path for other in store.children(entry.path.rpartition("/")[0])[1]):
        other = inner + path.rpartition("/")[2]
        if is_image_name(other):
            work.reserve(target_name(other, "PNG", work.options.format), other)


def _content(store: Store, name: str, entry: Entry, size: int = -1) -> bytes:
    if size < 0 and entry.size > MAX_BYTES:
        raise UnreadableSource(f"{name} has {entry.size:,} bytes, over the limit of {MAX_BYTES:,}")
    with reading(name), store.open(entry.path) as stream:
        return stream.read(size)


def _flush(waiting: list[tuple[str, bytes]], work: UnitWork) -> None:
    def put(results: list[PurifiedFile]) -> None:
        for result in results:
            if not result.error:
                data = result.data
                work.sink.put(result.target, lambda stream, data=data: stream.write(data))  # type: ignore[misc]

    work.purify(waiting, put)


def _copy(store: Store, name: str, entry: Entry, work: UnitWork) -> None:
    with reading(name):
        source = store.open(entry.path)

    def copy(stream: IO[bytes]) -> None:
        shutil.copyfileobj(source, stream)

    with source:
        work.note({"name": name, "output": work.sink.put(name, copy)})
