"""Which units of a corpus are left to do, and who does them. Rerun the command to resume; shards may run at once."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO

from codefend.core.runs import plain
from codefend.purifiers import load
from codefend.purifiers.base import Purifier
from codefend.purifiers.corpus.groups import purify_group
from codefend.purifiers.corpus.meter import metered
from codefend.purifiers.corpus.stores import Store
from codefend.purifiers.corpus.tables import check_columns, purify_table
from codefend.purifiers.corpus.tars import purify_tar
from codefend.purifiers.corpus.unit_work import UnitWork, UnreadableSource
from codefend.purifiers.corpus.units import Unit, find_units, take_shard
from codefend.purifiers.image_files import FolderOptions, is_image_name, target_name
from codefend.types import CodefendError

CONFIG = ".codefend/config.json"
MANIFESTS = ".codefend/manifest"
FAILURES = ".codefend/failures"  # of units that are done: the lines of a manifest that name an error
_WRITERS = {"tar": purify_tar, "table": purify_table, "group": purify_group}
_SETTLED = 1000  # lines of failures that a report holds


@dataclass(frozen=True)
class CorpusOptions:
    """``files`` says how each image is read, purified and written; the rest, what is done with the corpus."""

    files: FolderOptions = field(default_factory=FolderOptions)
    column: str | None = None  # of Parquet files; None: every image column
    keep_others: bool = False  # also copy the files of folders that are not images
    shard: tuple[int, int] = (1, 1)  # number, from 1, and count

    def fingerprint(self) -> dict[str, object]:
        """The settings that decide what is written; shards share them."""
        return {**self.files.fingerprint(), "layout": "corpus", "column": self.column, "keep_others": self.keep_others}


@dataclass
class UnitReport:
    """What became of one unit."""

    name: str
    size: int  # bytes of the source
    images: int = 0
    failures: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)  # the first ones: name, reason
    unreadable: str = ""  # why the unit could not be read; nothing of it was written then


@dataclass
class CorpusReport:
    """What became of all units of this shard, those of earlier runs in ``skipped``; failures are those of all runs."""

    images: int = 0
    units: int = 0
    skipped: int = 0  # units
    failures: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)

    def add(self, report: UnitReport) -> None:
        unreadable = [(report.name, report.unreadable)] if report.unreadable else []
        self.units += 1
        self.images += report.images
        self.failures += report.failures - len(report.failed)  # a report holds the first ones
        self.fail([*report.failed, *unreadable])

    def fail(self, failed: list[tuple[str, str]]) -> None:
        self.failures += len(failed)
        self.failed += failed[: _SETTLED - len(self.failed)]


@dataclass(frozen=True)
class UnitPurifier:
    """Does units one after the other. Picklable until it is called; loads the purifier once in each process."""

    sink: Store
    options: CorpusOptions
    load_purifier: Callable[[str], Purifier] = load

    def __call__(self, unit: Unit, tick: Callable[[int, int], None] = lambda images, size: None) -> UnitReport:
        """Purify a unit, write it, then its manifest. Raises CodefendError when the sink cannot be written."""
        report = UnitReport(unit.name, unit.size)
        try:
            with tempfile.TemporaryFile() as rows:
                self._purify(unit, report, rows, tick)
        except OSError as error:  # reading and writing raise others
            raise CodefendError(f"cannot write a temporary file ({error.strerror or error}); set TMPDIR") from error
        return report

    def _purify(self, unit: Unit, report: UnitReport, rows: IO[bytes], tick: Callable[[int, int], None]) -> None:
        purifier = _loaded(self.load_purifier, self.options.files.purifier)
        with UnitWork(purifier, self.options.files, self.sink, rows, self.options.column, tick) as work:
            try:
                outputs = _WRITERS[unit.kind](unit, work)
            except UnreadableSource as error:
                report.unreadable = str(error)
                return
        if work.failures:
            self.sink.put(f"{FAILURES}/{unit.manifest}", lambda stream: _write_failures(stream, rows))
        summary = {"unit": unit.name, "images": work.images, "failed": work.failures, "outputs": outputs}
        self.sink.put(f"{MANIFESTS}/{unit.manifest}", lambda stream: _write_manifest(stream, summary, rows))
        report.images, report.failures = work.images, work.failures
        report.failed = [(unit.inside(name), reason) for name, reason in work.failed]


_purifiers: dict[str, Purifier] = {}  # of this process, by name


def _loaded(load_purifier: Callable[[str], Purifier], name: str) -> Purifier:
    if name not in _purifiers:
        _purifiers.clear()
        _purifiers[name] = load_purifier(name)
    return _purifiers[name]


def _write_manifest(stream: IO[bytes], summary: dict[str, object], rows: IO[bytes]) -> None:
    stream.write((json.dumps(plain(summary), ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass"))
    rows.seek(0)
    shutil.copyfileobj(rows, stream)


def _write_failures(stream: IO[bytes], rows: IO[bytes]) -> None:
    rows.seek(0)
    for line in rows:
        if "error" in json.loads(line):
            stream.write(line)


def _read_failures(sink: Store, unit: Unit) -> list[tuple[str, str]]:
    """The images of a finished unit that failed: name, reason."""
    lines = (sink.read(f"{FAILURES}/{unit.manifest}") or b"").splitlines()
    return [(unit.inside(record["name"]), record["error"]) for record in map(json.loads, lines)]


Tick = Callable[[int, int], None]
Engine = Callable[[UnitPurifier, Iterable[Unit], Tick], Iterator[UnitReport]]


def in_this_process(purify: UnitPurifier, units: Iterable[Unit], tick: Tick) -> Iterator[UnitReport]:
    """The engine without an engine: one unit after the other."""
    return (purify(unit, tick) for unit in units)


def purify_corpus(
    sources: Sequence[str], sink: str, options: CorpusOptions, engine: Engine = in_this_process
) -> CorpusReport:
    """Purify archives, tables and folders, by path or fsspec URL, into the folder or URL ``sink``.

    Raises CodefendError for a missing source, a source without images, a sink with another manifest or other files, a
    column that holds no images, and when the sink cannot be written; never for a broken image or file, which are in the
    report.
    """
    place, report = Store(sink), CorpusReport()

    def units() -> Iterator[Unit]:
        return take_shard(find_units(sources, place, keep_others=options.keep_others), options.shard)

    _check_names(find_units(sources, place, keep_others=options.keep_others), place, options.files.format)
    done = set[str]() if _saved_config(place, options) is None else place.names(MANIFESTS)
    failed = place.names(FAILURES) if done else set[str]()
    count, size, tables = 0, 0, list[Unit]()
    for unit in units():
        if unit.manifest in done:
            report.skipped += 1
            if unit.manifest in failed:
                report.fail(_read_failures(place, unit))
            continue
        count, size = count + 1, size + unit.size
        tables += [unit] if unit.kind == "table" and not tables else []
    for unit in tables:  # a wrong column is in all of them
        check_columns(unit, options.column)

    def todo() -> Iterator[Unit]:
        _open_sink(place, options)  # only now: an engine that cannot start leaves no sink behind
        yield from (unit for unit in units() if unit.manifest not in done)

    if count:
        with metered(size) as meter:
            for result in engine(UnitPurifier(place, options), todo(), meter.tick):
                report.add(result)
                meter.finish(result.images + result.failures, result.size)
    return report


def _check_names(units: Iterator[Unit], sink: Store, ending: str | None) -> None:
    """Raise CodefendError when there is nothing to do, or two files or a unit and its source have one output.

    Of files that are images by content alone the output is not known yet; `UnitWork` checks it.
    """
    names: set[int] = set()
    for unit in units:
        for name, _ in unit.files:
            target = target_name(name, "PNG", ending) if unit.kind == "group" and is_image_name(name) else name
            if hash(target) in names:
                raise CodefendError(f"{name} and another file would both be written to {target} in {sink.url}")
            names.add(hash(target))
        if any(entry.path == sink.path(name) and Store(unit.source).fs == sink.fs for name, entry in unit.files):
            raise CodefendError(f"{unit.name} would be overwritten by its own output; choose another folder")
    if not names:
        raise CodefendError(f"no images, Parquet files or tar archives found; {sink.url} is unchanged")


def _saved_config(sink: Store, options: CorpusOptions) -> dict[str, object] | None:
    """The config of the sink; None for one that is new or to be overwritten. Raises CodefendError for another."""
    saved, config = sink.read(CONFIG), plain(options.fingerprint())
    before = None if saved is None else _parse(saved, sink)
    settings = None if before is None else {key: value for key, value in before.items() if key != "weights"}
    if settings == config:
        return before
    if not options.files.overwrite:
        if settings is not None and "layout" not in settings:
            raise CodefendError(f"{sink.url} was written without --workers, --shard or the like; choose another sink")
        if settings is not None:
            keys = [key for key in sorted({*settings, *config}) if settings.get(key) != config.get(key)]
            changes = "; ".join(f"{key} was {settings.get(key)!r}, now {config.get(key)!r}" for key in keys)
            raise CodefendError(f"{sink.url} was written with other options: {changes}. Choose another sink")
        if sink.has_files():
            raise CodefendError(f"{sink.url} holds other files; choose another sink, or use --overwrite")
    return None


def _open_sink(sink: Store, options: CorpusOptions) -> None:
    """Load the purifier before any worker does, and write the config. Raises CodefendError for other weights."""
    weights = _loaded(load, options.files.purifier).weights_digest()
    saved = _saved_config(sink, options)  # again: another shard may have started meanwhile
    config = saved or plain(options.fingerprint())
    if config.setdefault("weights", weights) != weights:
        raise CodefendError(f"{sink.url} was written with other weights of {options.files.purifier}; choose another")
    if saved is None:
        sink.remove(MANIFESTS)
        sink.remove(FAILURES)
    text = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    sink.put(CONFIG, lambda stream: stream.write(text))


def _parse(saved: bytes, sink: Store) -> dict[str, object]:
    try:
        config = json.loads(saved)
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise CodefendError(f"{sink.path(CONFIG)} is damaged; remove it and use --overwrite")
    return config
