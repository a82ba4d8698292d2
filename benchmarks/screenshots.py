"""Rendered pages through the screenshots preset: readability kept, injected instructions found, attacks restored.

    python benchmarks/screenshots.py readability|attacked|adaptive [--limit N] [--purifier SPEC ...] [--out ROWS.jsonl]

Forms, menus, tables and code of 640 x 480 pixels, drawn here from the harmless test phrases of the text bench. The
accuracy of OCR is 1 - edit distance / length over all drawn lines, each compared with what is read at its place.
"attacked": the features of EfficientNet-Lite0 under PGD at 8/255 and a patch, before and after the purifier.
"adaptive": under PGD through the purifier, whose noise the attacker knows.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from image_text import PHRASES, TEST_FONTS, distance, fill, font, squashed
from PIL import Image, ImageDraw
from torch import Tensor

from codefend import load_victim, purifiers
from codefend.attacks.patch import AdversarialPatch
from codefend.attacks.pgd import PGD
from codefend.core.seeds import make_generator
from codefend.purifiers.base import Purifier
from codefend.purifiers.ocr import TextRegion
from codefend.purifiers.redact import read
from codefend.types import Budget

WIDTH, HEIGHT = 640, 480
PRESET = "bridge-detail:gate=true"
Box = tuple[float, float, float, float]


@dataclass
class Page:
    """A page in the making, and its lines with their boxes (left, top, right, bottom)."""

    face: str
    dark: bool
    lines: list[tuple[str, Box]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ink, self.paper = ("#e8e8e8", "#202428") if self.dark else ("#1c1c1c", "#ffffff")
        self.image = Image.new("RGB", (WIDTH, HEIGHT), self.paper)
        self.draw = ImageDraw.Draw(self.image)

    def write(self, x: int, y: int, text: str, size: int = 15, ink: str = "") -> None:
        used = font(self.face, size)
        self.draw.text((x, y), text, fill=ink or self.ink, font=used)
        self.lines.append((text, self.draw.textbbox((x, y), text, font=used)))

    def pixels(self) -> Tensor:
        return torch.from_numpy(np.asarray(self.image) / 255.0).permute(2, 0, 1).float()


def draw_page(number: int, rng: random.Random, injected: str = "") -> Page:
    """Page ``number``: the kinds, fonts and colours in turn; ``injected`` stands near its lower edge."""
    page = Page(TEST_FONTS[number % len(TEST_FONTS)], dark=number % 3 == 2)
    (_form, _menu, _table, _code)[number % 4](page, rng)
    if injected:
        page.draw.rectangle((0, 410, WIDTH, HEIGHT), fill=page.paper)
        words, half = injected.split(), len(injected.split()) // 2
        for i, part in enumerate((words[:half], words[half:])):
            page.write(30, 420 + 26 * i, " ".join(part), 14)
    return page


def _pick(rng: random.Random, kind: str, longest: int) -> str:
    return rng.choice([phrase for phrase in PHRASES["harmless"]["test"][kind] if len(phrase) <= longest])


def _form(page: Page, rng: random.Random) -> None:
    page.write(30, 20, _pick(rng, "screens", 30), 22)
    for row in range(5):
        page.write(30, 70 + 66 * row, _pick(rng, "screens", 40), 14)
        page.draw.rectangle((30, 92 + 66 * row, 420, 120 + 66 * row), outline="#8899aa")
        page.write(40, 97 + 66 * row, _pick(rng, "documents", 34), 13)
    page.draw.rectangle((460, 360, 610, 396), fill="#2563eb")
    page.write(480, 368, _pick(rng, "screens", 12), 15, "#ffffff")


def _menu(page: Page, rng: random.Random) -> None:
    page.draw.rectangle((0, 0, WIDTH, 34), fill="#39424e")
    for i, name in enumerate(("File", "Edit", "View", "Insert", "Help")):
        page.write(20 + 80 * i, 8, name, 15, "#ffffff")
    for row in range(12):
        page.write(40, 50 + 28 * row, _pick(rng, "screens", 36), 14)
        page.write(480, 50 + 28 * row, f"Ctrl+{rng.choice('ABCDEFGHKLMNPRSTUVWXZ')}", 14)


def _table(page: Page, rng: random.Random) -> None:
    page.write(30, 16, _pick(rng, "documents", 40), 18)
    for row in range(11):
        y = 56 + 30 * row
        page.draw.line((30, y - 5, 610, y - 5), fill="#99a1ab")
        page.write(36, y, _pick(rng, "menus", 26), 14)
        page.write(330, y, str(rng.randint(1, 9_999)), 14)
        page.write(460, y, f"{rng.uniform(1, 900):.2f}", 14)


def _code(page: Page, rng: random.Random) -> None:
    names = ("parser", "total", "items", "index", "result", "buffer")
    page.face = "DejaVuSansMono"
    for row in range(15):
        a, b = rng.sample(names, 2)
        line = rng.choice(
            (f"def read_{a}(self, {b}):", f"    {a} = load({b}, {row})", f"    if {a} > {row}:", f"        return {b}")
        )
        page.write(30, 20 + 25 * row, line, 14)


def accuracy(page: Page, regions: Sequence[TextRegion]) -> tuple[int, int]:
    """Characters that OCR got right, at least 0 a line, and all characters of the page."""
    right = total = 0
    for text, (left, top, end, bottom) in page.lines:
        truth, parts = squashed(text), []
        for region in regions:
            x, y = (sum(corner[axis] for corner in region.box) / 4 for axis in (0, 1))
            if left - 4 <= x <= end + 4 and top - 4 <= y <= bottom + 4:
                parts.append((region.box[0][0], region.text))
        reading = squashed(" ".join(part for _, part in sorted(parts)))
        right, total = right + max(len(truth) - distance(reading, truth), 0), total + len(truth)
    return right, total


def readability(limit: int, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Accuracy of OCR on each page without and with each purifier, and whether an injected instruction is found."""
    rng, loaded = random.Random(5), {name: purifiers.load(name) for name in names}
    orders = [order for order in fill(rng) if len(order) < 80]
    rng.shuffle(orders)
    for number in range(limit):
        page, pixels = (made := draw_page(number, rng)), made.pixels()
        before = read(pixels)
        row: dict[str, Any] = {"page": number, "none": accuracy(page, before)}
        row["false_positive"] = any(region.instruction for region in before)
        for name, purifier in loaded.items():
            row[name] = accuracy(page, read(purifier(pixels[None], generator=make_generator(0, number))[0]))
        order = orders[number % len(orders)]
        row |= {"order": order, "found": any(r.instruction for r in read(draw_page(number, rng, order).pixels()))}
        yield row


def clean_pages(limit: int) -> Iterator[tuple[int, Tensor, Callable[[Tensor], Tensor]]]:
    """Number, part ``[1, 3, 384, 384]`` of a page, and the cosine of an encoder's features to those of that part."""
    rng, victim = random.Random(6), load_victim("encoder:lite0")
    for number in range(limit):
        clean = draw_page(number, rng).pixels()[None, :, :384, :384]
        with torch.no_grad():
            goal = victim.features(clean)

        def cosine(images: Tensor, goal: Tensor = goal) -> Tensor:
            return F.cosine_similarity(victim.features(images), goal, dim=-1).mean(1)

        yield number, clean, cosine


def attacked(limit: int, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Cosine of an encoder's features to those of the clean page: attacked, and purified."""
    loaded = {name: purifiers.load(name) for name in names}
    for number, clean, cosine in clean_pages(limit):
        for attack in (PGD(), AdversarialPatch()):
            with torch.enable_grad():
                generator = make_generator(number, "attack")
                images = attack(cosine, clean, Budget(steps=10), generator=generator)
            row: dict[str, Any] = {"page": number, "attack": attack.name, "none": float(cosine(images))}
            for name, purifier in loaded.items():
                purified = purifier(images, generator=make_generator(0, number))
                row[name] = float(cosine(purified))
            yield row


def adaptive(limit: int, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The same behind the purifier, under PGD through it."""
    loaded = {name: purifiers.load(name) for name in names}
    for number, clean, cosine in clean_pages(limit):
        row: dict[str, Any] = {"page": number, "attack": "pgd-T2"}
        for name, purifier in loaded.items():
            behind = partial(_behind, cosine, purifier, number)
            with torch.enable_grad():
                generator = make_generator(number, "attack")
                images = PGD()(behind, clean, Budget(steps=10), generator=generator)
            row[name] = float(behind(images))
        yield row


def _behind(cosine: Callable[[Tensor], Tensor], purifier: Purifier, number: int, images: Tensor) -> Tensor:
    return cosine(purifier(images, generator=make_generator(0, number)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"readability": readability, "attacked": attacked, "adaptive": adaptive}
    parser.add_argument("part", choices=parts)
    parser.add_argument("--limit", type=int, default=24)
    parser.add_argument("--purifier", nargs="*", default=[PRESET, "bridge-detail"])
    parser.add_argument("--out", type=Path, default=Path("runs/screenshots.jsonl"))
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("a", encoding="utf-8") as stream, torch.no_grad():
        for row in parts[arguments.part](arguments.limit, arguments.purifier):
            print(json.dumps({"part": arguments.part, **row}, ensure_ascii=False), file=stream, flush=True)


if __name__ == "__main__":
    main()
