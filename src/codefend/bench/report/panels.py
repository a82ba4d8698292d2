"""Pictures of the first examples: clean, attacked, the difference, what each defense made of it, and the answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from codefend.bench.report import Report
from codefend.bench.results import BARE, CLEAN, THREATS, eps_label, score
from codefend.core import images
from codefend.core.runs import Row
from codefend.types import CodefendError

AMPLIFY = 8  # of the difference
QUALITY = 90  # WebP, for display; what was judged lies in the run folder as PNG


@dataclass(frozen=True)
class Picture:
    """One picture with what is said below it; ``right`` is None where no answer was judged."""

    url: str
    caption: str
    answer: str = ""
    right: bool | None = None


@dataclass(frozen=True)
class Strip:
    """One line of pictures under a title."""

    title: str
    pictures: list[Picture]


@dataclass(frozen=True)
class Panel:
    """One example: what was asked, what would be right, and its strips."""

    task: str
    example: str
    prompt: str
    references: list[str]
    strips: list[Strip]


def panels(report: Report) -> list[Panel]:
    """The examples whose pictures were kept: the first ones of each task, not chosen by their outcome.

    Of the attacks, the first of each goal is shown at the largest eps.
    """
    kept = [row for row in report.rows if row.get("pictures")]
    found = []
    for task, example in dict.fromkeys((row["task"], row["example"]) for row in kept):
        mine = [row for row in kept if (row["task"], row["example"]) == (task, example)]
        strips = _strips(report.folder, mine)
        if strips:
            first = mine[0]
            found.append(Panel(task, example, first["prompt"], first["references"][:3], strips))
    return found


def _strips(folder: Path, rows: list[Row]) -> list[Strip]:
    clean = [row for row in rows if row["attack"] == CLEAN]
    original = next((found for row in clean if (found := _load(folder, row, "clean")) is not None), None)
    if original is None:
        return []
    strips = [Strip("nobody attacks", _answered(folder, clean, "clean", original))]
    attacked = [row for row in rows if row["attack"] != CLEAN]
    for attack in _shown_attacks(attacked):
        chosen = [row for row in attacked if row["attack"] == attack]
        chosen = [row for row in chosen if row["eps"] == max(r["eps"] for r in chosen)]
        for threat in THREATS:
            level = [row for row in chosen if row["threat"] == threat]
            alike = [level] if threat in ("T0", "T1") else [[row] for row in level]  # T0: one image for all defenses
            strips += [_attacked(folder, same, original) for same in alike if same]
    return strips


def _shown_attacks(rows: list[Row]) -> list[str]:
    """The first attack of each goal."""
    first: dict[str, str] = {}
    for row in rows:
        if row["access"] != "control":
            first.setdefault(row["goal"], row["attack"])
    return list(first.values())


def _attacked(folder: Path, rows: list[Row], original: Tensor) -> Strip:
    row = rows[0]
    elsewhere = row.get("crafted_on", row["victim"]) != row["victim"]
    surrogate = f"{row['crafted_on']}, another victim" if elsewhere else "a surrogate defense"
    through = {"T0": "the bare victim", "T1": surrogate}.get(row["threat"], row["defense"])
    title = f"{row['threat']}: {row['attack']} at {eps_label(row['eps'], row['norm'])} through {through}"
    if row["skipped"]:
        return Strip(f"{title}: left alone, the clean answer is wrong already", [])
    picture = _load(folder, row, "attacked")
    if picture is None or picture.shape != original.shape:
        return Strip(f"{title}: the picture is gone", [])
    shown = _answered(folder, rows, "attacked", picture)
    difference = (0.5 + AMPLIFY * (picture - original)).clamp(0, 1)
    return Strip(title, [shown[0], Picture(_url(difference), f"difference x{AMPLIFY}"), *shown[1:]])


def _answered(folder: Path, rows: list[Row], name: str, picture: Tensor) -> list[Picture]:
    """The picture itself, with the undefended answer where there is one, and what each defense made of it."""
    bare = next((row for row in rows if row["defense"] == BARE), None)
    found = [Picture(_url(picture), name, *_answer(bare))]
    for row in rows:
        purified = None if row["defense"] == BARE else _load(folder, row, "purified")
        if purified is not None:
            found.append(Picture(_url(purified), f"after {row['defense']}", *_answer(row)))
    return found


def _answer(row: Row | None) -> tuple[str, bool | None]:
    return ("", None) if row is None else (row["answer"], score(row, field="scores") >= 0.5)


def _load(folder: Path, row: Row, name: str) -> Tensor | None:
    """A kept picture; None when it is gone or doesn't lie in the run folder."""
    path = folder / str(row["pictures"].get(name, ""))
    if not path.is_file() or not path.resolve().is_relative_to(folder.resolve()):
        return None
    try:
        return images.load(path).pixels
    except CodefendError:
        return None


def _url(pixels: Tensor) -> str:
    scale = max(1, round(96 / pixels.shape[-1]))  # tiny pictures would be blurred by the browser
    if scale > 1:
        pixels = torch.repeat_interleave(torch.repeat_interleave(pixels, scale, -1), scale, -2)
    return images.encode_data_url(pixels, "WEBP", quality=QUALITY)
