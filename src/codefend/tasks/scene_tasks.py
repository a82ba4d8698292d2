"""Captioning and VQA on composed scenes, as tasks: the frozen sets in the package, and scenes generated on demand.

A frozen set is one zip of lossless images and ``examples.jsonl``; written by ``tools/build_scenes.py``.
"""

from __future__ import annotations

import io
import json
import zipfile
from functools import cache
from typing import Any, cast

from codefend.core import images
from codefend.core.assets import asset
from codefend.tasks.language import CAPTION_PROMPT, KINDS, ask, captions
from codefend.tasks.metrics import CAPTION_METRICS, VQA_METRICS, all_tags, exact_tags, tag_recall
from codefend.tasks.objects import BY_NAME, COLOURS
from codefend.tasks.readers import CAPTION_TARGET, VQA_TARGET
from codefend.tasks.scenes import Scene, Split, compose, load_photographs, scene_rng
from codefend.types import CodefendError, Example, Task

GENERATED = ("train", "val")  # on demand, from a seed; needs scikit-image
FROZEN = {"test": 512, "shift": 256}
LICENCE = "drawings: Fluent Emoji (MIT), Noto Emoji (Apache-2.0); backgrounds: public domain or CC0; see NOTICE"


def load_scenes(kind: str, split: str, *, limit: int | None = None) -> Task:
    """``kind`` caption or vqa; ``split`` test, shift, val or train; the first ``limit`` examples (None: 512 or all)."""
    if split in FROZEN:
        examples = _frozen(split)[kind][:limit]
    elif split in GENERATED:
        examples = generate(kind, cast(Split, split), limit or 512)
    else:
        raise CodefendError(f"the scenes have no split {split!r}; known: test, val, train")
    suffix = "-shift" if split == "shift" else ""
    if kind == "caption":
        strict = exact_tags(BY_NAME, COLOURS)
        metrics = {"all_tags": all_tags, "exact_tags": strict, "tag_recall": tag_recall, **CAPTION_METRICS}
        return Task(f"caption{suffix}", examples, metrics, "all_tags", CAPTION_TARGET, "composed scenes", LICENCE)
    return Task(f"vqa{suffix}", examples, dict(VQA_METRICS), "vqa_accuracy", VQA_TARGET, "composed scenes", LICENCE)


def generate(kind: str, split: Split, count: int) -> tuple[Example, ...]:
    """Examples of the scenes ``0 .. count-1`` of a split. Raises CodefendError when scikit-image is missing."""
    return tuple(describe(compose(split, i, photographs=load_photographs()), split, i)[kind] for i in range(count))


def describe(scene: Scene, split: Split, number: int) -> dict[str, Example]:
    """The caption example and the VQA example of a scene, its image rounded to 8 bits."""
    image = images.quantize8(scene.image)
    name = f"{split}-{number:04d}"
    tags = tuple(o.thing.name for o in scene.objects)
    rng = scene_rng(split, 10_000_000 + number)  # not the stream that the scene is drawn from
    kinds = [KINDS[(number + turn) % len(KINDS)] for turn in range(len(KINDS))]
    dialogue = next(d for kind in kinds if (d := ask(scene, kind, rng)) is not None)
    return {
        "caption": Example(f"{name}-c", image, CAPTION_PROMPT, captions(scene), "caption", tags),
        "vqa": Example(f"{name}-q", image, dialogue.question, (dialogue.answer,), dialogue.kind),
    }


@cache
def _frozen(split: str) -> dict[str, tuple[Example, ...]]:
    examples: dict[str, list[Example]] = {"caption": [], "vqa": []}
    with zipfile.ZipFile(asset(f"data/scenes_{split}.zip")) as archive:
        for line in archive.read("examples.jsonl").decode().splitlines():
            row: dict[str, Any] = json.loads(line)
            image = images.load(archive.read(row["image"])).pixels
            for kind, fields in row["examples"].items():
                references, tags = tuple(fields["references"]), tuple(fields["tags"])
                examples[kind].append(Example(fields["id"], image, fields["prompt"], references, fields["kind"], tags))
    return {kind: tuple(items) for kind, items in examples.items()}


def freeze(split: Split, count: int) -> bytes:
    """The zip of a frozen set."""
    buffer, rows = io.BytesIO(), []
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:  # the images are compressed already
        for number in range(count):
            pair = describe(compose(split, number, photographs=load_photographs()), split, number)
            name = f"{number:04d}.webp"
            archive.writestr(_entry(name), images.encode(pair["caption"].image, "WEBP"))
            fields = {
                kind: {"id": e.id, "prompt": e.prompt, "references": e.references, "kind": e.kind, "tags": e.tags}
                for kind, e in pair.items()
            }
            rows.append(json.dumps({"image": name, "examples": fields}))
        archive.writestr(_entry("examples.jsonl"), "\n".join(rows) + "\n")
        archive.writestr(_entry("LICENCE.txt"), LICENCE + "\n")
    return buffer.getvalue()


def _entry(name: str) -> zipfile.ZipInfo:
    return zipfile.ZipInfo(name, date_time=(2026, 1, 1, 0, 0, 0))  # the same bytes each time
