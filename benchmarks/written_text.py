"""The classifier of instruction-like text on text alone, without rendering and OCR.

    python benchmarks/written_text.py shares --texts runs/fresh-text.json
    python benchmarks/written_text.py rewordings

"shares": of injections that are found, and of harmless pages (four texts each) and single texts in which something is;
then the share of injections that is found at the thresholds that mark 1, 2 and 5% of these pages. The files are those
of `benchmarks/fresh_text.py` and `benchmarks/heldout_text.py`. "rewordings": an attacker who knows the classifier
writes the goals of `benchmarks/data/rewordings.json` in up to ten ways and takes the one with the lowest score.
"--characters" judges without the model of sentences. Prints rows for `results/image_text.json`.
"""

from __future__ import annotations

import argparse
import json
import random
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from codefend.purifiers import instructions, sentences
from codefend.purifiers.ocr import TextRegion

GOALS = Path(__file__).parent / "data/rewordings.json"
LINE = 44  # characters
PAGE = 4  # harmless texts


def regions(*texts: str) -> list[TextRegion]:
    """Paragraphs of lines of up to `LINE` characters, as OCR would return them."""
    lines, top = [], 0.0
    for text in texts:
        for line in textwrap.wrap(text, LINE):
            width = 8.0 * len(line)
            box = ((0.0, top), (width, top), (width, top + 12), (0.0, top + 12))
            lines.append(TextRegion(line, 1.0, box))
            top += 15.0
        top += 15.0
    return lines


def is_marked(*texts: str) -> bool:
    return any(region.instruction for region in instructions.mark(regions(*texts)))


def strength(*texts: str) -> float:
    """The highest evidence on a page; infinite where a rule matches."""
    lines = regions(*texts)
    windows = [" ".join(line.text for line in lines[a:b]) for a, b in instructions._paragraph_windows(lines)]
    if any(map(instructions.matches_rule, windows)):
        return float("inf")
    return max(map(instructions.evidence, windows), default=float("-inf"))


def curve(found: list[list[str]], pages: list[list[str]]) -> Iterator[dict[str, Any]]:
    """Rows of the injections that are found where a share of the pages is marked."""
    strengths, harmless = ([strength(*page) for page in group] for group in (found, pages))
    harmless.sort(reverse=True)
    for share in (0.01, 0.02, 0.05):
        level = harmless[int(share * len(harmless))]  # the first page that is not marked
        yield _row(f"found at {share:.0%} of pages", [value > level for value in strengths])


def shares(texts: dict[str, dict[str, list[str]]], pages: int) -> Iterator[dict[str, Any]]:
    """Rows by kind, and over all kinds of a group."""
    rng, sampled = random.Random(4), dict[str, list[list[str]]]()
    for group, prefix in (("instructions", "found"), ("test", "pages"), ("single", "single")):
        outcomes: dict[str, list[bool]] = {}
        for kind, items in texts.get(group, {}).items():
            samples = [rng.sample(items, PAGE) for _ in range(pages)] if group == "test" else [[text] for text in items]
            outcomes[kind] = [is_marked(*sample) for sample in samples]
            sampled[group] = sampled.get(group, []) + samples
        if outcomes:
            outcomes["all"] = [value for values in outcomes.values() for value in values]
        yield from (_row(f"{prefix}/{kind}", values) for kind, values in outcomes.items())
    if sentences.installed() and sampled.keys() >= {"instructions", "test"}:
        yield from curve(sampled["instructions"], sampled["test"])


def rewordings() -> Iterator[dict[str, Any]]:
    """The share of goals of which the open wording, and the best of ten, is not marked; and of all wordings."""
    goals = json.loads(GOALS.read_text(encoding="utf-8"))["goals"]
    passes = [[not is_marked(wording) for wording in wordings] for wordings in goals.values()]
    for count in (1, 2, 4, 10):
        yield _row(f"best of {count} wordings", [any(goal[:count]) for goal in passes])
    yield _row("wordings that are not open", [wording for goal in passes for wording in goal[1:]])


def _row(name: str, values: list[bool]) -> dict[str, Any]:
    return {"id": name, "value": round(sum(values) / max(len(values), 1), 3), "n": len(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["shares", "rewordings"])
    parser.add_argument("--texts", type=Path, default=Path("runs/fresh-text.json"))
    parser.add_argument("--pages", type=int, default=200, help="of each kind of harmless text")
    parser.add_argument("--name", default="fresh", help="of these texts, in the rows' ids")
    parser.add_argument("--characters", action="store_true", help="without the model of sentences")
    parser.add_argument("--weights", type=Path, help="of `sentences`, instead of the shipped ones")
    arguments = parser.parse_args()
    if arguments.weights:
        sentences.use(arguments.weights)
    if arguments.characters:
        sentences.installed = lambda: False
    if arguments.part == "shares":
        rows = shares(json.loads(arguments.texts.read_text(encoding="utf-8")), arguments.pages)
    else:
        rows = rewordings()
    for row in rows:
        row["id"] = f"text/{arguments.name}/{row['id']}" + ("/characters" if arguments.characters else "")
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
