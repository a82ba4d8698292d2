"""Tasks: examples with prompts, and the metrics of the answers.

This module imports no torch, so that ``codefend list tasks`` is quick.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from codefend.core.specs import lookup
from codefend.types import CodefendError

if TYPE_CHECKING:
    from codefend.types import Task


@dataclass(frozen=True)
class TaskSpec:
    """A line of ``codefend list tasks`` and the function that loads the task: ``build(split, limit, **options)``."""

    name: str
    summary: str
    build: Callable[..., Task]


def _scenes(kind: str, style_split: str) -> Callable[[str, int | None], Task]:
    def build(split: str, limit: int | None) -> Task:
        from codefend.tasks.scene_tasks import load_scenes

        if style_split == "shift":
            if split != "test":
                raise CodefendError("the shift sets have a test split only")
            split = "shift"
        return load_scenes(kind, split, limit=limit)

    return build


def _easyvqa(split: str, limit: int | None) -> Task:
    from codefend.tasks.easyvqa import load_easyvqa

    return load_easyvqa(split, limit=limit)


def _photos(kind: str) -> Callable[..., Task]:
    def build(split: str, limit: int | None, **options: Any) -> Task:
        from codefend.tasks.photographs import load_photo_task

        return load_photo_task(kind, split, limit, **options)

    return build


def _photographs(split: str, limit: int | None, **options: Any) -> Task:
    from codefend.tasks.photographs import load_photographs

    return load_photographs(split, limit, **options)


def _files(reader: str, *paths: str) -> Callable[..., Task]:
    """A task from the user's files: ``paths`` are the options that name them, in the reader's order."""

    def build(split: str, limit: int | None, **options: Any) -> Task:
        from codefend.tasks import readers

        usage = f"{', '.join(f'{path}=PATH' for path in paths)}, and size=PIXELS for batches of images of any size"
        if split != "test":
            raise CodefendError(f"a task from your files has no split {split!r}; leave split out")
        if missing := [path for path in paths if path not in options]:
            raise CodefendError(f"the task reads your files, and {missing[0]!r} is not given; give {usage}")
        if unknown := sorted(set(options) - {*paths, "size"}):
            raise CodefendError(f"the task has no option {unknown[0]!r}; give {usage}")
        try:
            size = int(options["size"]) if "size" in options else None
        except ValueError as error:
            raise CodefendError(f"size must be a whole number of pixels, not {options['size']!r}") from error
        read: Callable[..., Task] = getattr(readers, reader)
        return read(*(options[path] for path in paths), size=size, limit=limit)

    return build


TASKS: dict[str, TaskSpec] = {
    spec.name: spec
    for spec in (
        TaskSpec(
            "caption", "caption composed scenes of 1 to 4 objects (512 frozen test images)", _scenes("caption", "")
        ),
        TaskSpec("vqa", "questions of six kinds on the same scenes", _scenes("vqa", "")),
        TaskSpec("caption-shift", "captioning in a second drawing style (256 images)", _scenes("caption", "shift")),
        TaskSpec("vqa-shift", "questions in a second drawing style", _scenes("vqa", "shift")),
        TaskSpec("easy-vqa", "coloured shapes, an external task (Zhou 2019; the easy-vqa package)", _easyvqa),
        TaskSpec(
            "photographs", "crops of held-out photographs: how far features and answers are restored", _photographs
        ),
        TaskSpec(
            "photo-caption",
            "caption crops of held-out photographs by ImageNet class, or of yours: photo-caption:folder=FOLDER",
            _photos("caption"),
        ),
        TaskSpec(
            "photo-vqa", "questions about the same crops: what it shows, whether a class is there", _photos("vqa")
        ),
        TaskSpec(
            "coco-captions",
            "captions of your COCO files: coco-captions:annotations=FILE,images=FOLDER[,size=224]",
            _files("read_coco_captions", "annotations", "images"),
        ),
        TaskSpec(
            "vqav2",
            "questions of your VQAv2 files: vqav2:questions=FILE,annotations=FILE,images=FOLDER[,size=224]",
            _files("read_vqa", "questions", "annotations", "images"),
        ),
        TaskSpec(
            "textvqa",
            "questions of your TextVQA-style file: textvqa:data=FILE,images=FOLDER[,size=224]",
            _files("read_textvqa", "data", "images"),
        ),
    )
}


def load(name: str, *, split: str = "test", limit: int | None = None, **options: Any) -> Task:
    """The task ``name``. ``split`` is "test" (frozen, in the package), or "val"/"train" where the task has them.

    ``options`` are the task's own, such as ``side`` and ``folder`` of photographs, or the files of ``coco-captions``.
    Raises CodefendError for an unknown name (the nearest are named), split or option, or a limit below 1.

    >>> from codefend import load_task
    >>> load_task("vqa", limit=2).headline
    'vqa_accuracy'
    """
    if limit is not None and limit < 1:
        raise CodefendError(f"limit must be 1 or more, not {limit}")
    return lookup("task", name, TASKS).build(split, limit, **options)
