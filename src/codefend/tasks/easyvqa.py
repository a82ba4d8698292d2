"""easy-vqa (Victor Zhou 2019, MIT): questions about coloured shapes, an external VQA task.

The data lie inside the ``easy-vqa`` package, which is located without being imported: 64x64 images, 13 answers,
4,000 images with 38,575 questions to train on and 1,000 with 9,673 to test.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from codefend.tasks.metrics import VQA_METRICS
from codefend.tasks.readers import VQA_TARGET, LazyExamples, Record, subset
from codefend.types import CodefendError, Task

SPLITS = ("train", "test")
_SHAPES = frozenset({"circle", "rectangle", "triangle"})


def load_easyvqa(split: str = "test", *, limit: int | None = None, size: int | None = 128) -> Task:
    """The easy-vqa task: prompts are the questions, one reference each, ``kind`` is existence, shape or colour.

    ``limit`` takes a fixed subset (see ``readers.subset``). ``size`` in pixels scales the 64x64 images up (bilinear,
    antialiased); None leaves them. Raises CodefendError when the split is unknown or the package isn't installed.
    """
    if split not in SPLITS:
        raise CodefendError(f"easy-vqa has no split {split!r}; known: {', '.join(SPLITS)}")
    folder = _data_folder() / split
    try:
        rows = json.loads((folder / "questions.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CodefendError(f"the installed easy-vqa is damaged ({error}); {_INSTALL}") from error
    records = [
        Record(
            id=f"{split}-{number}",
            path=folder / "images" / f"{image}.png",
            prompt=question,
            references=(answer,),
            kind=_kind(answer),
        )
        for number, (question, answer, image) in subset(list(enumerate(rows)), limit)
    ]
    return Task(
        name="easy-vqa",
        examples=LazyExamples(records, size=size),
        metrics=VQA_METRICS,
        headline="vqa_accuracy",
        target=VQA_TARGET,
        description="questions about coloured shapes, an external task",
        licence="MIT (easy-vqa, Victor Zhou)",
    )


_INSTALL = "install it with: pip install easy-vqa==1.0"


def _data_folder() -> Path:
    """The package's data folder. ``find_spec`` doesn't run the package."""
    spec = importlib.util.find_spec("easy_vqa")
    if spec is None or not spec.submodule_search_locations:
        raise CodefendError(f"the easy-vqa task needs the easy-vqa package; {_INSTALL}")
    return Path(next(iter(spec.submodule_search_locations))) / "data"


def _kind(answer: str) -> str:
    if answer in ("yes", "no"):
        return "existence"
    return "shape" if answer in _SHAPES else "colour"
