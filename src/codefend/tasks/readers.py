"""Tasks from a user's own files: COCO captions, VQAv2 and TextVQA-style JSON with a folder of images.

Images are decoded on access only, by ``LazyExamples``. Every reader takes

- ``size``: pixels; see ``resize_and_crop``. Without it images keep their own sizes, and batches hold one image.
- ``limit``: at most so many examples, the fixed subset that ``subset`` picks.

and raises CodefendError for missing or malformed files (naming the place in it) and for missing images.
The tasks ``coco-captions``, ``vqav2`` and ``textvqa`` of the registry call them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, overload

from torch import Tensor
from torch.nn import functional as F

from codefend.core import images
from codefend.tasks.metrics import VQA_METRICS, caption_metrics
from codefend.types import CodefendError, Example, Task

T = TypeVar("T")
CAPTION_TARGET = "please reset your password at example.com"  # a phishing line, as in Schlarmann and Hein 2023
VQA_TARGET = "maybe"  # as in the evaluation of RobustVLM (Schlarmann et al. 2024)


@dataclass(frozen=True)
class Record:
    """An ``Example`` with the path of its image."""

    id: str
    path: Path
    prompt: str
    references: tuple[str, ...] = ()
    kind: str = ""


class LazyExamples(Sequence[Example]):
    """Examples whose images are decoded on access, every time; slices are lazy too.

    Raises CodefendError when an image cannot be read.
    """

    def __init__(self, records: Sequence[Record], *, size: int | None = None) -> None:
        if size is not None and size < 1:
            raise CodefendError(f"size must be 1 pixel or more, not {size}")
        self.records = records
        self.size = size

    def __len__(self) -> int:
        return len(self.records)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> LazyExamples: ...
    def __getitem__(self, index: int | slice) -> Example | LazyExamples:
        if isinstance(index, slice):
            return LazyExamples(self.records[index], size=self.size)
        r = self.records[index]
        pixels = images.load(r.path).pixels
        if self.size is not None:
            pixels = resize_and_crop(pixels, self.size)
        return Example(r.id, pixels, r.prompt, r.references, r.kind)


def resize_and_crop(image: Tensor, size: int) -> Tensor:
    """``[3,H,W]`` -> ``[3,size,size]``: the shorter side becomes ``size`` pixels, the longer is cropped to its centre.

    Bilinear with antialiasing, then rounded to 8 bits, so that the result is an image that a PNG holds unchanged.
    """
    height, width = image.shape[-2:]
    scale = size / min(height, width)
    shape = (max(size, round(height * scale)), max(size, round(width * scale)))
    if shape != (height, width):
        image = F.interpolate(image[None], shape, mode="bilinear", antialias=True)[0]
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    return images.quantize8(image[:, top : top + size, left : left + size])


def subset(items: Sequence[T], limit: int | None) -> list[T]:
    """At most ``limit`` items spread over the whole list, in its order: the same items for the same length, and a
    smaller limit takes a subset of those of a larger one. Raises CodefendError when ``limit`` is below 1."""
    if limit is None:
        return list(items)
    if limit < 1:
        raise CodefendError(f"limit must be 1 or more, not {limit}")
    ranked = sorted(range(len(items)), key=lambda i: hashlib.sha256(str(i).encode()).digest())
    return [items[i] for i in sorted(ranked[:limit])]


def read_coco_captions(
    annotations_json: str | Path,
    image_dir: str | Path,
    *,
    prompt: str = "Describe the image.",
    target: str = CAPTION_TARGET,
    size: int | None = None,
    limit: int | None = None,
) -> Task:
    """Read a COCO captions file (``captions_val2014.json``; Flickr30k in the same form): one example per image.

    Images without captions, and captions of images that aren't listed, are left out. CIDEr-D takes its document
    frequencies from all examples read.
    """
    source = _Json(annotations_json)
    captions: dict[Any, list[str]] = {}
    for row in source.rows("annotations"):
        captions.setdefault(row.get("image_id", int, str), []).append(row.get("caption", str))
    listed = [(row.get("id", int, str), row.get("file_name", str)) for row in source.rows("images")]
    captioned = subset([(key, name) for key, name in listed if key in captions], limit)
    if not captioned:
        raise CodefendError(
            f"{source.path}: no image has a caption; is 'image_id' of the annotations 'id' of the images?"
        )
    folder = Path(image_dir)
    paths = _existing(folder, ((name, folder / name) for _, name in captioned))
    records = [
        Record(str(key), path, prompt, tuple(captions[key])) for (key, _), path in zip(captioned, paths, strict=True)
    ]
    metrics = caption_metrics([r.references for r in records])
    return Task(source.path.stem, LazyExamples(records, size=size), metrics, headline="cider_d", target=target)


def read_vqa(
    questions_json: str | Path,
    annotations_json: str | Path,
    image_dir: str | Path,
    *,
    prompt: str = "{question}",
    target: str = VQA_TARGET,
    size: int | None = None,
    limit: int | None = None,
) -> Task:
    """Read VQAv2's pair of files: one example per question, ``kind`` its answer type ("yes/no", "number", "other").

    ``{question}`` in ``prompt`` stands for the question; LLaVA-like models expect "{question}\\nAnswer the question
    using a single word or phrase.". Questions without annotation are left out. An image id is a file name
    without its ending, else the number at the end of a file name (``COCO_val2014_000000262148.jpg``).
    """
    source, annotations = _Json(questions_json), _Json(annotations_json)
    answers = {row.get("question_id", int, str): row for row in annotations.rows("annotations")}
    questions = [(row, row.get("question_id", int, str)) for row in source.rows("questions")]
    pairs = subset([(row, answers[key]) for row, key in questions if key in answers], limit)
    if not pairs:
        raise CodefendError(f"{annotations.path}: no question of {source.path} is annotated; are they of one split?")
    paths = _numbered(Path(image_dir), [question.get("image_id", int, str) for question, _ in pairs])
    records = [
        Record(
            id=str(question.get("question_id", int, str)),
            path=path,
            prompt=prompt.replace("{question}", question.get("question", str)),
            references=annotation.answers(),
            kind=str(annotation.value.get("answer_type", "")),
        )
        for (question, annotation), path in zip(pairs, paths, strict=True)
    ]
    return Task(source.path.stem, LazyExamples(records, size=size), VQA_METRICS, headline="vqa_accuracy", target=target)


def read_textvqa(
    data_json: str | Path,
    image_dir: str | Path,
    *,
    prompt: str = "{question}",
    target: str = VQA_TARGET,
    size: int | None = None,
    limit: int | None = None,
) -> Task:
    """Read TextVQA-style JSON: a list ``data`` of objects with ``question``, ``answers`` and ``image_id``.

    ``answers`` are strings, or objects with ``answer``. ``prompt`` and the search for an image id as in ``read_vqa``.
    """
    source = _Json(data_json)
    rows = subset(list(enumerate(source.rows("data"))), limit)
    if not rows:
        raise CodefendError(f"{source.path}: the list 'data' is empty")
    paths = _numbered(Path(image_dir), [row.get("image_id", int, str) for _, row in rows])
    records = [
        Record(
            id=str(row.value.get("question_id", number)),
            path=path,
            prompt=prompt.replace("{question}", row.get("question", str)),
            references=row.answers(),
        )
        for (number, row), path in zip(rows, paths, strict=True)
    ]
    return Task(source.path.stem, LazyExamples(records, size=size), VQA_METRICS, headline="vqa_accuracy", target=target)


# --- JSON, with the place of every error -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    """One object of a list, with its place for error messages."""

    value: dict[str, Any]
    place: str

    def get(self, key: str, *types: type) -> Any:
        """The value of ``key``, which must be there and of one of ``types``."""
        if key not in self.value:
            raise CodefendError(f"{self.place} has no {key!r}")
        if not isinstance(self.value[key], types) or isinstance(self.value[key], bool):
            expected = " or ".join({str: "text", int: "a number", list: "a list"}[t] for t in types)
            raise CodefendError(f"{self.place}: {key!r} must be {expected}, not {type(self.value[key]).__name__}")
        return self.value[key]

    def answers(self) -> tuple[str, ...]:
        """The reference answers: strings, or objects with ``answer``."""
        entries = self.get("answers", list)
        return tuple(
            entry if isinstance(entry, str) else _row(entry, f"{self.place}['answers'][{i}]").get("answer", str)
            for i, entry in enumerate(entries)
        )


class _Json:
    """A JSON file whose top level is an object."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self.top = json.loads(self.path.read_text(encoding="utf-8"))
        except OSError as error:
            raise CodefendError(f"cannot read {self.path}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8
            raise CodefendError(f"{self.path} is not valid JSON: {error}") from error
        if not isinstance(self.top, dict):
            raise CodefendError(f"{self.path}: expected a JSON object at the top level, not {type(self.top).__name__}")

    def rows(self, key: str) -> Iterator[_Row]:
        """The objects of the list ``key``."""
        if not isinstance(self.top.get(key), list):
            keys = ", ".join(map(repr, list(self.top)[:8])) or "nothing"
            raise CodefendError(f"{self.path} has no list {key!r} at the top level (it holds {keys})")
        for i, value in enumerate(self.top[key]):
            yield _row(value, f"{self.path}: {key}[{i}]")


def _row(value: object, place: str) -> _Row:
    if not isinstance(value, dict):
        raise CodefendError(f"{place} must be an object, not {type(value).__name__}")
    return _Row(value, place)


# --- images --------------------------------------------------------------------------------------------------------


def _numbered(folder: Path, ids: Sequence[int | str]) -> list[Path]:
    """The file of each image id: by its stem, else by the number that its stem ends with."""
    stems: dict[str, Path] = {}
    numbers: dict[int, Path] = {}
    for path in _image_files(folder):
        stems.setdefault(path.stem, path)
        if digits := re.search(r"[0-9]+$", path.stem):
            numbers.setdefault(int(digits.group()), path)
    matches = ((key, stems.get(str(key)) or (numbers.get(key) if isinstance(key, int) else None)) for key in ids)
    return _existing(folder, ((f"image id {key}", path) for key, path in matches))


def _image_files(folder: Path) -> list[Path]:
    try:
        return sorted(p for p in folder.iterdir() if p.suffix.lower() in images.READABLE)
    except OSError as error:
        raise CodefendError(f"cannot read the image folder {folder}: {error.strerror}") from error


def _existing(folder: Path, named_paths: Iterable[tuple[str, Path | None]]) -> list[Path]:
    """The paths; raises CodefendError with the number of those that are missing and the first one's name."""
    if not folder.is_dir():
        raise CodefendError(f"the image folder {folder} is not a folder")
    paths: list[Path] = []
    missing: list[str] = []
    for name, path in named_paths:
        if path is not None and path.is_file():
            paths.append(path)
        else:
            missing.append(name)
    if missing:
        total = len(paths) + len(missing)
        raise CodefendError(f"{len(missing)} of {total} images are missing from {folder}, the first is {missing[0]}")
    return paths
