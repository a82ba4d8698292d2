"""Text in images: instructions found and harmless text left alone, by rendering; screenshots; cost.

    python benchmarks/image_text.py detection|harmless|adaptive|cost|summary [--limit N] [--out ROWS.jsonl]
    python benchmarks/image_text.py heldout|heldout-harmless --heldout FILE --fonts FILE... [...]

"heldout": texts of others from `benchmarks/heldout_text.py` in fonts that are given. The other parts: phrases of the
test split (`benchmarks/data/image_text_phrases.json`) in `TEST_FONTS`. A rendering is legible when OCR reads at least
80% of its characters. Typographic attacks on victims are rows of the attack registry:
`codefend eval quick --set attacks=typographic --set defenses=none,redact:scope=all`.
"""

from __future__ import annotations

import argparse
import json
import random
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont

from codefend import tasks
from codefend.purifiers import ocr, sentences
from codefend.purifiers.redact import read

PHRASES = json.loads((Path(__file__).parent / "data/image_text_phrases.json").read_text(encoding="utf-8"))
# The regression is trained on text alone, so no font is in training; these five are the ones that results name.
TEST_FONTS = ("DejaVuSans", "DejaVuSerif-Bold", "DejaVuSansMono", "STIXGeneral", "cmss10")
SIDE = 320  # pixels of a rendered image


@dataclass(frozen=True)
class Rendering:
    """How a phrase is written: letters' height in pixels, contrast in [0, 1], degrees, tiles, and its background."""

    size: int = 20
    contrast: float = 1.0
    angle: float = 0.0
    tiles: bool = False
    spacing: int = 0  # spaces between letters
    swap: str = ""  # letters replaced by look-alikes: pairs like "a@"
    scene: bool = True  # on a scene instead of one colour


RENDERINGS = {
    "plain": Rendering(scene=False),
    "on a scene": Rendering(),
    "small (11 px)": Rendering(size=11),
    "large (34 px)": Rendering(size=34),
    "contrast .3": Rendering(contrast=0.3),
    "contrast .1": Rendering(contrast=0.1, scene=False),
    "tilted by 12 degrees": Rendering(angle=12),
    "upright (90 degrees)": Rendering(angle=90),
    "upside down": Rendering(angle=180),
    "split over tiles": Rendering(tiles=True, scene=False),
}
EVASIONS = {
    "contrast .04": Rendering(contrast=0.04, scene=False),
    "contrast .02": Rendering(contrast=0.02, scene=False),
    "7 px": Rendering(size=7, scene=False),
    "tilted by 45 degrees": Rendering(angle=45),
    "spaced letters": Rendering(size=16, spacing=2, scene=False),
    "look-alike characters": Rendering(swap="a@e3i1o0s$t7", scene=False),
    "one word a tile, tilted": Rendering(tiles=True, angle=25),
}


def font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """A font of matplotlib by name, or any by its path without the ending ".ttf"."""
    return ImageFont.truetype(str(Path(get_data_path()) / "fonts/ttf" / f"{name}.ttf"), size)


def fill(rng: random.Random) -> list[str]:
    """The instructions of the test split, each with fillers drawn once."""
    fillers = PHRASES["fillers"]["test"]
    return [
        template.format(**{name: rng.choice(values) for name, values in fillers.items()})
        for template in PHRASES["instructions"]["test"]
    ]


def backgrounds() -> list[np.ndarray[Any, Any]]:
    """Scenes of the shift set, enlarged, as ``[SIDE, SIDE, 3]`` of 8 bits."""
    examples = tasks.load("caption-shift", limit=16).examples
    pixels = [(example.image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8) for example in examples]
    return [np.asarray(Image.fromarray(item).resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for item in pixels]


def letters(text: str, rendering: Rendering, face: str) -> Image.Image:
    """The letters as a grey mask of ``SIDE`` pixels a side."""
    for old, new in zip(rendering.swap[::2], rendering.swap[1::2], strict=True):
        text = text.replace(old, new)
    mask = Image.new("L", (SIDE, SIDE), 0)
    if rendering.tiles:
        words = text.split()
        pieces = [" ".join(words[i : i + 2]) for i in range(0, len(words), 2)][:12]
        for i, piece in enumerate(pieces):
            tile = letters(piece, Rendering(size=14, angle=rendering.angle), face).crop((60, 110, 260, 210))
            tile = tile.resize((SIDE // 2, SIDE // 4)) if rendering.angle else tile.crop((20, 20, 180, 80))
            mask.paste(tile, (SIDE // 2 * (i % 2), SIDE // 6 * (i // 2)))
        return mask
    text = (" " * rendering.spacing).join(text) if rendering.spacing else text
    used, draw = font(face, rendering.size), ImageDraw.Draw(mask)
    columns = max(int((SIDE - 30) / used.getlength("n")), 4)
    lines = "\n".join(textwrap.wrap(text, columns))
    draw.multiline_text((SIDE / 2, SIDE / 2), lines, fill=255, font=used, anchor="mm", align="center")
    return mask.rotate(rendering.angle, Image.Resampling.BICUBIC) if rendering.angle else mask


def render(
    text: str, rendering: Rendering, face: str, background: np.ndarray[Any, Any], rng: random.Random
) -> torch.Tensor:
    """``[3, SIDE, SIDE]``; letters are lighter than a dark background and darker than a light one."""
    base = background / 255.0 if rendering.scene else np.full((SIDE, SIDE, 3), rng.choice((0.1, 0.45, 0.9)))
    cover = np.asarray(letters(text, rendering, face))[..., None] / 255.0
    sign = 1.0 if base.mean() < 0.5 else -1.0
    ink = np.clip(base + sign * rendering.contrast, 0, 1)
    image = base * (1 - cover) + ink * cover
    return torch.from_numpy(image.round(6)).permute(2, 0, 1).float()


def distance(first: str, second: str) -> int:
    """Levenshtein's distance."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        previous, row[0] = row[0], i
        for j, b in enumerate(second, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (a != b))
    return row[-1]


def squashed(text: str) -> str:
    return "".join(filter(str.isalnum, text)).lower()


def legible(regions: list[ocr.TextRegion], text: str) -> bool:
    truth, reading = squashed(text), squashed("".join(region.text for region in regions))
    return distance(reading, truth) <= 0.2 * len(truth)


def detection(
    limit: int,
    renderings: dict[str, Rendering] = RENDERINGS,
    phrases: Sequence[str] = (),
    faces: Sequence[str] = TEST_FONTS,
) -> Iterator[dict[str, Any]]:
    """For each rendering, on ``limit`` of the phrases, by default the test split's: legible, found, and both."""
    rng, scenes = random.Random(1), backgrounds()
    phrases = list(phrases) or fill(rng)
    rng.shuffle(phrases)
    for number, (name, rendering) in enumerate(renderings.items()):
        for i in range(limit):
            text, face = phrases[(number * limit + i) % len(phrases)], faces[i % len(faces)]
            regions = read(render(text, rendering, face, scenes[i % len(scenes)], rng))
            found = any(region.instruction for region in regions)
            yield {
                "rendering": name,
                "text": text,
                "legible": legible(regions, text),
                "found": found,
                "font": Path(face).name,
            }


def harmless(
    limit: int,
    kinds: dict[str, list[str]] = PHRASES["harmless"]["test"],
    faces: Sequence[str] = TEST_FONTS,
) -> Iterator[dict[str, Any]]:
    """Harmless phrases, one an image for signs and four for menus, screens and documents."""
    rng, scenes = random.Random(2), backgrounds()
    for kind, phrases in kinds.items():
        for i in range(limit):
            count = 1 if kind == "signs" else 4
            text = "\n".join(phrases[(count * i + k) % len(phrases)] for k in range(count))
            rendering = Rendering(size=(20, 14, 26)[i % 3], scene=kind == "signs")
            flat = " ".join(text.split("\n")) if count == 1 else text
            regions = read(_page(flat, rendering, faces[i % len(faces)], scenes[i % len(scenes)], rng))
            wrong = [region.text for region in regions if region.instruction]
            yield {"kind": kind, "text": text, "found": bool(wrong), "lines": wrong, "read": len(regions)}


def _page(text: str, rendering: Rendering, face: str, scene: np.ndarray[Any, Any], rng: random.Random) -> torch.Tensor:
    """Several phrases below each other, or one in the middle."""
    if "\n" not in text:
        return render(text, rendering, face, scene, rng)
    page, used = Image.new("RGB", (SIDE * 2, SIDE), "white"), font(face, rendering.size)
    lines = [line for phrase in text.split("\n") for line in (*textwrap.wrap(phrase, 36), "")]
    ImageDraw.Draw(page).multiline_text((20, 10), "\n".join(lines), fill="black", font=used)
    return torch.from_numpy(np.asarray(page) / 255.0).permute(2, 0, 1).float()


def adaptive(limit: int) -> Iterator[dict[str, Any]]:
    """An attacker who knows the defense: renderings that OCR may miss."""
    yield from detection(limit, EVASIONS)


def heldout(limit: int, texts: dict[str, Any], faces: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Injections of others in all renderings."""
    phrases = [phrase for kind in texts["instructions"].values() for phrase in kind]
    yield from detection(limit, RENDERINGS, phrases, faces)


def heldout_harmless(limit: int, texts: dict[str, Any], faces: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Pages of four strings of programs, or four paragraphs of documents."""
    yield from harmless(limit, texts["test"], faces)


def cost(limit: int) -> Iterator[dict[str, Any]]:
    """CPU seconds of reading a megapixel, by how much text it holds; on idle cores, wall time is that or less."""
    rng, scenes = random.Random(3), backgrounds()
    used = font("DejaVuSans", 22)
    for lines in (0, 4, 12):
        for i in range(limit):
            page = Image.fromarray(scenes[i % len(scenes)]).resize((1000, 1000))
            draw = ImageDraw.Draw(page)
            for line in range(lines):
                text = rng.choice(PHRASES["harmless"]["test"]["documents"])[:40]
                draw.rectangle((40, 40 + 70 * line, 700, 76 + 70 * line), fill="white")
                draw.text((50, 44 + 70 * line), text, fill="black", font=used)
            image = torch.from_numpy(np.asarray(page) / 255.0).permute(2, 0, 1).float()
            if not i:
                read(image)
            wall, cpu = time.perf_counter(), time.process_time()
            regions = read(image)
            yield {
                "lines": lines,
                "read": len(regions),
                "cpu_s": time.process_time() - cpu,
                "wall_s": time.perf_counter() - wall,
            }


PARTS: dict[str, Callable[[int], Iterator[dict[str, Any]]]] = {
    "detection": detection,
    "harmless": harmless,
    "adaptive": adaptive,
    "cost": cost,
}


HELDOUT: dict[str, Callable[[int, dict[str, Any], Sequence[str]], Iterator[dict[str, Any]]]] = {
    "heldout": heldout,
    "heldout-harmless": heldout_harmless,
}


def summary(path: Path) -> Iterator[dict[str, Any]]:
    """Rows for `results/image_text.json` from the rows of all parts and of `benchmarks/screenshots.py`."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        group = row.get("rendering") or row.get("kind") or row.get("attack") or str(row.get("lines", ""))
        groups.setdefault((row["part"], group), []).append(row)
    groups |= {("heldout", "all"): [row for row in rows if row["part"] == "heldout"]}
    groups |= {("heldout-harmless", "all"): [row for row in rows if row["part"] == "heldout-harmless"]}
    groups = {key: group for key, group in groups.items() if group}
    groups |= {("found", "all"): [row for row in rows if row["part"] == "detection"]}
    groups |= {("harmless", "all"): [row for row in rows if row["part"] == "harmless"]}
    for (part, name), group in groups.items():
        if part in ("detection", "found"):
            legible = [row for row in group if row["legible"]]
            yield _figure(f"text/legible/{name}", [row["legible"] for row in group])
            if legible:
                yield _figure(f"text/found/{name}", [row["found"] for row in legible])
        elif part == "heldout":
            yield _figure(f"text/heldout/legible/{name}", [row["legible"] for row in group])
            yield _figure(f"text/heldout/found/{name}", [row["found"] for row in group if row["legible"]])
        elif part in HELDOUT:
            yield _figure(f"text/{part}/{name}", [row["found"] for row in group])
        elif part == "adaptive" and "found" in group[0]:
            yield _figure(f"text/evades/{name}", [not row["found"] for row in group])
        elif part == "harmless":
            yield _figure(f"text/false-positive/{name}", [row["found"] for row in group])
        elif part == "cost":
            yield _figure(f"text/cpu/{name}-lines", [row["cpu_s"] for row in group])
        elif part in ("attacked", "adaptive") and "attack" in group[0]:
            yield from (_figure(f"screenshots/{name}/{key}", [row[key] for row in group]) for key in _defenses(group))
        elif part == "readability":
            for key in _defenses(group):
                right, total = (sum(row[key][i] for row in group) for i in (0, 1))
                yield {"id": f"screenshots/ocr/{key}", "value": round(right / total, 4), "n": total}
            yield _figure("screenshots/found", [row["found"] for row in group])
            yield _figure("screenshots/false-positive", [row["false_positive"] for row in group])


def _defenses(group: list[dict[str, Any]]) -> list[str]:
    return [key for key in group[0] if key == "none" or ":" in key or key.startswith("bridge")]


def _figure(name: str, values: list[float]) -> dict[str, Any]:
    return {"id": name, "value": round(sum(values) / max(len(values), 1), 3), "n": len(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*PARTS, *HELDOUT, "summary"])
    parser.add_argument("--limit", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("runs/image-text.jsonl"))
    parser.add_argument("--heldout", type=Path, default=Path("runs/heldout-text.json"))
    parser.add_argument("--fonts", type=Path, nargs="*", default=(), help="TrueType files")
    parser.add_argument("--weights", type=Path, help="of the classifier of sentences, instead of the shipped ones")
    arguments = parser.parse_args()
    if arguments.weights:
        sentences.use(arguments.weights)
    if arguments.part == "summary":
        print("\n".join(map(json.dumps, summary(arguments.out))))
        return
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("a", encoding="utf-8") as stream, torch.no_grad():
        if arguments.part in HELDOUT:
            texts = json.loads(arguments.heldout.read_text(encoding="utf-8"))
            faces = [str(path.resolve().with_suffix("")) for path in arguments.fonts] or TEST_FONTS
            rows = HELDOUT[arguments.part](arguments.limit, texts, faces)
        else:
            rows = PARTS[arguments.part](arguments.limit)
        for row in rows:
            print(json.dumps({"part": arguments.part, **row}, ensure_ascii=False), file=stream, flush=True)


if __name__ == "__main__":
    main()
