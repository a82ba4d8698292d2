"""Images of the first examples: clean, attacked, their difference, purified by each defense, and the answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from codefend.bench.report.reading import Report
from codefend.bench.results import BARE, CLEAN, THREATS, eps_label, score
from codefend.core import images
from codefend.core.runs import Row
from codefend.types import CodefendError

AMPLIFY = 8  # of the difference
QUALITY = 90  # WebP, for display; the run folder has the PNG files


@dataclass(frozen=True)
class PanelImage:
    """One image with its caption; ``right`` is None where no answer was judged."""

    url: str
    caption: str
    answer: str = ""
    right: bool | None = None


@dataclass(frozen=True)
class Strip:
    """One line of images under a title."""

    title: str
    images: list[PanelImage]


@dataclass(frozen=True)
class Panel:
    """One example: its prompt, its references and its strips."""

    task: str
    example: str
    prompt: str
    references: list[str]
    strips: list[Strip]


def panels(report: Report) -> list[Panel]:
    """The examples whose images were stored: the first ones of each task, not selected by outcome.

    Of the attacks, the first of each goal is included, at the largest eps.
    """
    stored = [row for row in report.rows if row.get("pictures")]
    examples: list[Panel] = []
    for task, example in dict.fromkeys((row["task"], row["example"]) for row in stored):
        rows = [row for row in stored if (row["task"], row["example"]) == (task, example)]
        strips = _strips(report.folder, rows)
        if strips:
            examples.append(Panel(task, example, rows[0]["prompt"], rows[0]["references"][:3], strips))
    return examples


def _strips(folder: Path, rows: list[Row]) -> list[Strip]:
    clean = [row for row in rows if row["attack"] == CLEAN]
    original = next((image for row in clean if (image := _load(folder, row, "clean")) is not None), None)
    if original is None:
        return []
    strips = [Strip("no attack", _with_answers(folder, clean, "clean", original))]
    attacked = [row for row in rows if row["attack"] != CLEAN]
    for attack in _first_attacks(attacked):
        chosen = [row for row in attacked if row["attack"] == attack]
        chosen = [row for row in chosen if row["eps"] == max(r["eps"] for r in chosen)]
        for threat in THREATS:
            level = [row for row in chosen if row["threat"] == threat]
            same = [level] if threat in ("T0", "T1") else [[row] for row in level]  # T0: one image for all defenses
            strips += [_attacked_strip(folder, group, original) for group in same if group]
    return strips


def _first_attacks(rows: list[Row]) -> list[str]:
    """The first attack of each goal."""
    first: dict[str, str] = {}
    for row in rows:
        if row["access"] != "control":
            first.setdefault(row["goal"], row["attack"])
    return list(first.values())


def _attacked_strip(folder: Path, rows: list[Row], original: Tensor) -> Strip:
    row = rows[0]
    elsewhere = row.get("crafted_on", row["victim"]) != row["victim"]
    surrogate = f"{row['crafted_on']}, another victim" if elsewhere else "a surrogate defense"
    through = {"T0": "the undefended victim", "T1": surrogate}.get(row["threat"], row["defense"])
    title = f"{row['threat']}: {row['attack']} at {eps_label(row['eps'], row['norm'])} through {through}"
    if row["skipped"]:
        return Strip(f"{title}: skipped, the clean answer is wrong", [])
    image = _load(folder, row, "attacked")
    if image is None or image.shape != original.shape:
        return Strip(f"{title}: the image is missing", [])
    first, *purified = _with_answers(folder, rows, "attacked", image)
    difference = (0.5 + AMPLIFY * (image - original)).clamp(0, 1)
    return Strip(title, [first, PanelImage(_url(difference), f"difference x{AMPLIFY}"), *purified])


def _with_answers(folder: Path, rows: list[Row], name: str, image: Tensor) -> list[PanelImage]:
    """The image itself, with the undefended answer where there is one, and its purified forms."""
    bare = next((row for row in rows if row["defense"] == BARE), None)
    strip = [PanelImage(_url(image), name, *_answer(bare))]
    for row in rows:
        purified = None if row["defense"] == BARE else _load(folder, row, "purified")
        if purified is not None:
            strip.append(PanelImage(_url(purified), f"after {row['defense']}", *_answer(row)))
    return strip


def _answer(row: Row | None) -> tuple[str, bool | None]:
    return ("", None) if row is None else (row["answer"], score(row, field="scores") >= 0.5)


def _load(folder: Path, row: Row, name: str) -> Tensor | None:
    """A stored image; None when it is missing or outside the run folder."""
    path = folder / str(row["pictures"].get(name, ""))
    if not path.is_file() or not path.resolve().is_relative_to(folder.resolve()):
        return None
    try:
        return images.load(path).pixels
    except CodefendError:
        return None


def _url(pixels: Tensor) -> str:
    scale = max(1, round(96 / pixels.shape[-1]))  # browsers blur tiny images
    if scale > 1:
        pixels = torch.repeat_interleave(torch.repeat_interleave(pixels, scale, -1), scale, -2)
    return images.encode_data_url(pixels, "WEBP", quality=QUALITY)
