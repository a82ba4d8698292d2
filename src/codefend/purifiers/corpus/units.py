"""A corpus as units of work: archives, tables and groups of files."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from codefend.purifiers.corpus.stores import Entry, Store
from codefend.purifiers.image_files import TABLES, TARS, Kind, is_image_name, kind_of
from codefend.types import CodefendError

GROUP = 16  # files of a group, on average; at most four times as many


@dataclass(frozen=True)
class Unit:
    """Files that are purified, written and noted in the manifest together. ``name`` is relative to the sink."""

    kind: Kind
    source: str  # the URL that the user named
    name: str
    files: tuple[tuple[str, Entry], ...]  # name relative to the sink, file

    @property
    def size(self) -> int:
        return sum(entry.size for _, entry in self.files)

    @property
    def manifest(self) -> str:
        """The name of its manifest, which says what the source was: a changed source is purified again."""
        text = "\n".join(f"{name} {entry.size} {entry.stamp}" for name, entry in self.files)
        return f"{self.name}.{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}.jsonl"

    def inside(self, name: str) -> str:
        """The name, in the corpus, of an image that is called ``name`` in the manifest."""
        return name if self.kind == "group" else f"{self.name}/{name}"


def find_units(sources: Sequence[str], sink: Store, *, keep_others: bool = False) -> Iterator[Unit]:
    """The units of files and folders, in a fixed order. Raises CodefendError for a missing source.

    Folders keep their inner paths below the sink; hidden files, links to folders and the sink itself are left out.
    """
    for url in sources:
        store = Store(url)
        entry = store.entry(store.root)
        if entry is None and store.root == sink.root and type(store.fs) is type(sink.fs):
            raise CodefendError(f"{url} would be overwritten by its own output; choose another folder")
        if entry is None:
            yield from _find_below(store, store.root, sink, keep_others)
            continue
        name = store.root.rpartition("/")[2]
        if kind_of(name) is None and not is_image_name(name):
            raise CodefendError(f"{url} is neither an image nor {' '.join((*TARS, *TABLES))}")
        yield Unit(kind_of(name) or "group", url, name, ((name, entry),))


def _find_below(store: Store, folder: str, sink: Store, keep_others: bool) -> Iterator[Unit]:
    if folder == sink.root and type(store.fs) is type(sink.fs):
        return
    folders, entries = store.children(folder)
    loose: list[tuple[str, Entry]] = []
    for entry in entries:
        name = entry.path[len(store.root.rstrip("/")) + 1 :]
        if (kind := kind_of(name)) is not None:
            yield Unit(kind, store.url, name, ((name, entry),))
        elif keep_others or is_image_name(name):
            loose.append((name, entry))
    yield from _groups(store, loose)
    for inner in folders:
        yield from _find_below(store, inner, sink, keep_others)


def _groups(store: Store, files: Sequence[tuple[str, Entry]]) -> Iterator[Unit]:
    """Cut a folder where the hash of a name says so: a file that comes or goes changes its own group alone."""
    group: list[tuple[str, Entry]] = []
    for name, entry in files:
        group.append((name, entry))
        digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()
        if digest[0] % GROUP == 0 or len(group) == 4 * GROUP:
            yield Unit("group", store.url, name, tuple(group))
            group = []
    if group:
        yield Unit("group", store.url, group[-1][0], tuple(group))


def take_shard(units: Iterator[Unit], shard: tuple[int, int]) -> Iterator[Unit]:
    """Shard ``i`` of ``n``, from 1: every n-th unit."""
    number, count = shard
    return itertools.islice(units, number - 1, None, count)


def parse_shard(text: str) -> tuple[int, int]:
    """Read ``i/n``. Raises CodefendError unless 1 <= i <= n."""
    first, _, second = text.partition("/")
    if not (first.isdecimal() and second.isdecimal() and 1 <= int(first) <= int(second)):
        raise CodefendError(f"shard {text!r} is not I/N with 1 <= I <= N, such as 1/4")
    return int(first), int(second)
