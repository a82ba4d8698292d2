"""WebDataset archives: images are purified in place, all other members carried through, in the same order."""

from __future__ import annotations

import copy
import gzip
import io
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

from codefend.core import signatures
from codefend.purifiers.corpus.stores import Store
from codefend.purifiers.corpus.unit_work import MAX_BYTES, UnitWork, UnreadableSource, reading
from codefend.purifiers.corpus.units import Unit
from codefend.purifiers.image_files import PurifiedFile, is_image_name

_SMALL = 1 << 20  # bytes: a larger member that is no image is copied without reading it whole
_MANY = 16  # members that wait for an image
_DAMAGE = (tarfile.TarError, zlib.error)


def purify_tar(unit: Unit, work: UnitWork) -> dict[str, str]:
    """Write the archive anew; returns its hash by name. A broken image is left out, with its reason in the rows.

    Raises UnreadableSource for a damaged archive, of which nothing is written.
    """
    store, (name, entry) = Store(unit.source), unit.files[0]
    with reading(name):
        source = store.open(entry.path)

    def write(stream: IO[bytes]) -> None:
        with _compressed(stream, name) as raw, tarfile.open(fileobj=raw, mode="w|") as archive:
            _ArchiveCopy(archive, work).run(_members(source, name))

    with source:
        return {name: work.sink.put(name, write)}


@contextmanager
def _compressed(stream: IO[bytes], name: str) -> Iterator[Any]:
    if not name.lower().endswith("gz"):
        yield stream
        return
    with gzip.GzipFile(filename="", fileobj=stream, mode="wb", mtime=0) as packed:  # no time: equal bytes again
        yield packed


class _StrictInfo(tarfile.TarInfo):
    """Refuses what tarfile takes for the end of an archive: a damaged header, or no end at all."""

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> Any:
        try:
            return super().fromtarfile(tarfile)
        except _TRUNCATED as error:
            raise UnreadableSource(f"a damaged header or no end mark at byte {tarfile.offset:,} ({error})") from error


_TRUNCATED = (
    tarfile.TruncatedHeaderError,  # type: ignore[attr-defined]
    tarfile.InvalidHeaderError,  # type: ignore[attr-defined]
    tarfile.EmptyHeaderError,  # type: ignore[attr-defined]
    tarfile.SubsequentHeaderError,  # type: ignore[attr-defined]
)


@dataclass
class _Member:
    """A member's content as a stream that is never shorter than its header says."""

    stream: io.BufferedReader | None
    left: int
    name: str

    def head(self) -> bytes:
        """Its first bytes, which `read` returns again."""
        with reading(self.name, *_DAMAGE):
            return b"" if self.stream is None else self.stream.peek(signatures.HEAD)[: signatures.HEAD]

    def read(self, size: int = -1) -> bytes:
        with reading(self.name, *_DAMAGE):
            data = self.stream.read(size if size >= 0 else self.left) if self.stream is not None else b""
        self.left -= len(data)
        if not data and self.left > 0 and size != 0:
            raise UnreadableSource(f"cannot read {self.name}: it ends {self.left:,} bytes early")
        return data


def _members(source: IO[bytes], name: str) -> Iterator[tuple[tarfile.TarInfo, _Member]]:
    try:
        with reading(name, *_DAMAGE):
            archive = tarfile.open(fileobj=source, mode="r|*", tarinfo=_StrictInfo)  # noqa: SIM115
        while True:
            with reading(name, *_DAMAGE):
                info = archive.next()
                stream: Any = archive.extractfile(info) if info is not None and info.isreg() else None
            archive.members = []  # type: ignore[attr-defined]  # tarfile keeps every header it has read
            if info is None:
                return
            yield info, _Member(stream, info.size if info.isreg() else 0, f"{name}/{info.name}")
    except UnreadableSource as error:
        text = str(error)
        raise error if name in text else UnreadableSource(f"cannot read {name}: {text}") from error


_Waiting = tuple[tarfile.TarInfo, bytes, bool]  # header, content, whether it is an image


class _ArchiveCopy:
    """Copies members to another archive; images wait until ``batch`` of them can be purified together."""

    def __init__(self, archive: tarfile.TarFile, work: UnitWork) -> None:
        self.archive, self.work = archive, work
        self.waiting: list[_Waiting] = []

    def run(self, members: Iterator[tuple[tarfile.TarInfo, _Member]]) -> None:
        for info, member in members:
            is_image = info.isreg() and (is_image_name(info.name) or signatures.is_image(member.head()))
            if is_image and info.size > MAX_BYTES:
                reason = f"{info.name} has {info.size:,} bytes, over the limit of {MAX_BYTES:,}"
                self.work.fail(info.name, reason)
            elif is_image or info.size <= _SMALL:
                self.waiting.append((info, _whole(member), is_image))
            else:
                self.flush()
                self.work.finish()  # what comes before it in the archive
                self.add(info, member)
            images = sum(image for _, _, image in self.waiting)
            if images >= self.work.options.batch or len(self.waiting) > _MANY:
                self.flush()
        self.flush()
        self.work.finish()

    def flush(self) -> None:
        """Purify the images that wait; everything is written in order."""
        waiting, self.waiting = self.waiting, []

        def write(results: list[PurifiedFile]) -> None:
            purified = iter(results)
            for info, data, is_image in waiting:
                if not is_image:
                    self.add(info, io.BytesIO(data))
                elif not (result := next(purified)).error:
                    self.add(_renamed(info, result), io.BytesIO(result.data))

        self.work.purify([(info.name, data) for info, data, is_image in waiting if is_image], write)

    def add(self, info: tarfile.TarInfo, content: Any) -> None:
        self.archive.addfile(info, content if info.isreg() else None)
        self.archive.members = []  # type: ignore[attr-defined]


def _whole(member: _Member) -> bytes:
    parts = []
    while member.left > 0:
        parts.append(member.read())
    return b"".join(parts)


def _renamed(info: tarfile.TarInfo, result: PurifiedFile) -> tarfile.TarInfo:
    changed = copy.copy(info)
    changed.name, changed.size = result.target, len(result.data)
    changed.pax_headers = {key: value for key, value in info.pax_headers.items() if key not in ("path", "size")}
    return changed
