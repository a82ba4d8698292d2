"""What every kind of unit needs: the purifier, the options, and a note for each image."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO

from codefend.core.runs import plain
from codefend.purifiers.base import Purifier
from codefend.purifiers.corpus.stores import Store
from codefend.purifiers.image_files import FolderOptions, PurifiedFile, purify_files
from codefend.types import CodefendError

MAX_BYTES = 1 << 30  # of one image file; more is a failure of that image


class UnreadableSource(CodefendError):
    """A file of the corpus cannot be read or is damaged: the unit fails, the others go on."""


@dataclass
class UnitWork:
    """Purifies the images of one unit and notes them in ``rows``, one JSON line each."""

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

    def purify(self, files: Sequence[tuple[str, bytes]], names: Sequence[str] = ()) -> list[PurifiedFile]:
        """Purify and note image files given as name and content; ``names`` are those for the manifest, if others."""
        results = purify_files(self.purifier, files, self.options)
        for result, (_, data), label in zip(results, files, names or [name for name, _ in files], strict=True):
            if result.error:
                self.fail(label, result.error)
            else:
                self.images += 1
                self.note({**result.record(), "name": label})
            self.tick(1, self.image_bytes or len(data))
        return results

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
