"""What every kind of unit needs: the purifier, the options, and a note for each image."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import IO, NamedTuple

from codefend.core.runs import plain
from codefend.purifiers.base import Purifier
from codefend.purifiers.corpus.stores import Store
from codefend.purifiers.image_files import FileSteps, FolderOptions, PurifiedFile
from codefend.types import CodefendError

MAX_BYTES = 1 << 30  # of one image file; more is a failure of that image


class UnreadableSource(CodefendError):
    """A file of the corpus cannot be read or is damaged: the unit fails, the others go on."""


class _Call(NamedTuple):
    names: Sequence[str]
    sizes: Sequence[int]  # bytes
    own_files: bool  # each result becomes a file, or a member of an archive
    then: Callable[[list[PurifiedFile]], None]


@dataclass
class UnitWork:
    """Purifies the images of one unit and notes them in ``rows``, one JSON line each. A context manager."""

    purifier: Purifier
    options: FolderOptions
    sink: Store
    rows: IO[bytes]
    column: str | None = None
    tick: Callable[[int, int], None] = lambda images, size: None
    images: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)  # the first ones: name, reason
    failures: int = 0
    image_bytes: int = 0  # of the source, for progress; 0: those of each image

    def __post_init__(self) -> None:
        self._files = FileSteps(self.purifier, self.options).overlapped()
        self._open = deque[_Call]()
        self._sources: dict[int, int] = {}  # of each output, by the hashes of their names

    def purify(
        self, files: Sequence[tuple[str, bytes]], then: Callable[[list[PurifiedFile]], None], names: Sequence[str] = ()
    ) -> None:
        """Purify and note image files given as name and content; ``names`` are those for the manifest, if others.

        Without ``names`` the results are files of their own, and one whose target is another's fails. ``then`` is
        called with the results, in the order of the calls: during a later one, or by `finish`.
        """
        sizes = [self.image_bytes or len(data) for _, data in files]
        self._open.append(_Call(names or [name for name, _ in files], sizes, not names, then))
        self._settle(self._files.push(files))

    def finish(self) -> None:
        """Complete all calls of `purify`."""
        self._settle(self._files.drain())

    def _settle(self, done: list[list[PurifiedFile]]) -> None:
        for results in done:
            call = self._open.popleft()
            results = [self._checked(result) for result in results] if call.own_files else results
            for result, name, size in zip(results, call.names, call.sizes, strict=True):
                if result.error:
                    self.fail(name, result.error)
                else:
                    self.images += 1
                    self.note({**result.record(), "name": name})
                self.tick(1, size)
            call.then(results)

    def reserve(self, target: str, name: str) -> bool:
        """Reserve an output for the file ``name``; False when it is another's already."""
        return self._sources.setdefault(hash(target), hash(name)) == hash(name)

    def _checked(self, result: PurifiedFile) -> PurifiedFile:
        if result.error or self.reserve(result.target, result.name):
            return result
        error = f"{result.name} and another image would both be written to {result.target}"
        return replace(result, target=result.name, data=b"", error=error)

    def __enter__(self) -> UnitWork:
        return self

    def __exit__(self, *error: object) -> None:
        self._files.__exit__(*error)

    def fail(self, name: str, reason: str) -> None:
        """Note an image that is left out."""
        self.failures += 1
        self.note({"name": name, "error": reason})
        if len(self.failed) < 100:
            self.failed.append((name, reason))

    def note(self, record: dict[str, object]) -> None:
        line = json.dumps(plain(record), ensure_ascii=False) + "\n"
        self.rows.write(line.encode("utf-8", "surrogatepass"))


@contextmanager
def reading(name: str, *kinds: type[BaseException]) -> Iterator[None]:
    """Raise errors of reading, those of ``kinds`` included, as UnreadableSource."""
    try:
        yield
    except UnreadableSource:
        raise
    except CodefendError as error:
        raise UnreadableSource(str(error)) from error
    except Exception as error:
        if not isinstance(error, (OSError, EOFError, *kinds)):
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UnreadableSource(f"cannot read {name}: {reason}") from error
