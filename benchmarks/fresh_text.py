"""Texts for `benchmarks/written_text.py` by authors that no training and no threshold has seen.

    pip download --no-deps bastioncorpus==0.6.0 && unzip bastioncorpus-*.whl -d sources
    python benchmarks/fresh_text.py sources --out runs/fresh-text.json
    python benchmarks/written_text.py shares --texts runs/fresh-text.json

``sources`` holds, each where it is named; all are read and none is stored in the repository:

- `bastioncorpus/corpus/injections.jsonl`: the English texts of the PyPI package bastioncorpus (MIT), both labels.
- `wasp.json`: `webarena_prompt_injections/configs/experiment_config.raw.json` of WASP (CC-BY-NC-4.0, for evaluation).
- `tensor-trust.jsonl`: the hijacking benchmark of Tensor Trust (no licence stated, for evaluation).
- `recipes/`: the Markdown files of based.cooking (public domain), which are full of imperatives.
- `govuk/`: the Markdown files of govuk-design-system (MIT): pages on forms, errors and buttons.
- `notinject/`: NotInject's JSON files (MIT): harmless requests with words that injections use, a text each.

Injections of more than `LONGEST` characters, and those with characters outside ASCII, are left out.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

LONGEST = 300  # characters of an injection that fit on a rendered image
PARAGRAPH = 140  # characters of a harmless paragraph


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def wasp(path: Path) -> list[str]:
    """The attackers' goals alone, without the frame around them."""
    goals = json.loads(path.read_text(encoding="utf-8"))["prompt_injections_setup_config"]
    return [_with(goal["instruction"], goal["parameters"]) for goal in goals]


def _with(template: str, values: dict[str, Any]) -> str:
    return re.sub(r"\{(\w+)\}", lambda match: str(values.get(match[1], match[1])), template)


def paragraphs(folder: Path) -> list[str]:
    """The starts of the paragraphs and list items of Markdown files, without markup."""
    texts: set[str] = set()
    for path in sorted(folder.rglob("*.md")):
        text = re.sub(r"\A---.*?^---$", "", path.read_text(encoding="utf-8", errors="ignore"), flags=re.S | re.M)
        text = re.sub(r"```.*?```|<[^>]*>|\{[%{].*?[%}]\}|!?\[|\]\([^)]*\)|[`*#|]", " ", text, flags=re.S)
        for part in re.split(r"\n\s*\n|\n\s*(?:-|\d+\.)\s", text):
            short = " ".join(part.split())[:PARAGRAPH]
            if len(short) > 25 and sum(map(str.isalpha, short)) > 0.6 * len(short):
                texts.add(short)
    return sorted(texts)


def legible(texts: Iterable[str]) -> list[str]:
    """Different texts of ASCII characters that fit on an image, in an order of chance."""
    fitting = sorted({short for text in texts if (short := " ".join(text.split())).isascii() and len(short) <= LONGEST})
    random.Random(28).shuffle(fitting)
    return fitting


def collect(sources: Path) -> dict[str, dict[str, list[str]]]:
    bastion = [row for row in lines(sources / "bastioncorpus/corpus/injections.jsonl") if row["lang"] == "en"]
    requests = [row for path in sorted((sources / "notinject").glob("*.json")) for row in json.loads(path.read_text())]
    instructions = {
        "tool output (bastioncorpus)": [
            r["text"] for r in bastion if r["label"] == "malicious" and r["channel"] != "user_input"
        ],
        "prompts (bastioncorpus)": [
            r["text"] for r in bastion if r["label"] == "malicious" and r["channel"] == "user_input"
        ],
        "goals (WASP)": wasp(sources / "wasp.json"),
        "hijacking (Tensor Trust)": [row["attack"] for row in lines(sources / "tensor-trust.jsonl")],
    }
    pages = {"recipes": paragraphs(sources / "recipes"), "forms (GOV.UK)": paragraphs(sources / "govuk")}
    single = {
        "benign (bastioncorpus)": [r["text"] for r in bastion if r["label"] == "benign"],
        "requests (NotInject)": [row["prompt"] for row in requests],
    }
    groups = {"instructions": instructions, "test": pages, "single": single}
    return {group: {kind: legible(texts) for kind, texts in kinds.items()} for group, kinds in groups.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/fresh-text.json"))
    arguments = parser.parse_args()
    groups = collect(arguments.sources)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(groups), encoding="utf-8")
    for name, kinds in groups.items():
        print(name, {kind: len(texts) for kind, texts in kinds.items()})


if __name__ == "__main__":
    main()
