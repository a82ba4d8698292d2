"""Held-out texts for `benchmarks/image_text.py`: injections collected by others, and harmless strings of programs.

    python benchmarks/heldout_text.py --injections prompt_injection.json --locale /usr/share/locale --out FILE

Injections are the English `user_input`s of CyberSecEval's prompt injection set (PurpleLlama,
`CybersecurityBenchmarks/datasets/prompt_injection/prompt_injection.json`, MIT) of up to 300 characters. Harmless texts
are the English strings of installed gettext catalogues, and paragraphs of the README files under `--doc`. None of these
is in training. A catalogue's or package's name decides whether its strings are for validation, which sets the
threshold, or for the test.
"""

from __future__ import annotations

import argparse
import gettext
import hashlib
import json
import random
import re
from collections.abc import Iterable
from pathlib import Path

LONGEST = 300  # characters of an injection that fit on a rendered image
NATIVE = ("iso_", "iso-", "xkeyboard")  # names of languages, countries and keys: no sentences


def split_of(name: str) -> str:
    return "validation" if hashlib.sha256(name.encode()).digest()[0] % 2 else "test"


def injections(path: Path) -> dict[str, list[str]]:
    """Texts by the kind of injection that their authors name."""
    kinds: dict[str, list[str]] = {}
    for item in json.loads(path.read_text(encoding="utf-8")):
        text = " ".join(item["user_input"].split())
        foreign = item["injection_variant"] == "different_user_input_language" or item["speaking_language"] != "English"
        if not foreign and len(text) <= LONGEST:
            kinds.setdefault(f"{item['injection_type']}: {item['injection_variant']}", []).append(text)
    return kinds


def interface_strings(folder: Path) -> dict[str, list[str]]:
    """The English strings of the catalogues (those with a German translation), as a screen shows them, by split."""
    strings: dict[str, set[str]] = {"validation": set(), "test": set()}
    for path in sorted(folder.glob("de/LC_MESSAGES/*.mo")):
        if path.name.startswith(NATIVE):
            continue
        with path.open("rb") as stream:
            try:
                catalogue = vars(gettext.GNUTranslations(stream))["_catalog"]
            except (IndexError, OSError, UnicodeDecodeError, ValueError):
                continue
        texts = (key[0] if isinstance(key, tuple) else key for key in catalogue)
        strings[split_of(path.stem)] |= set(filter(None, map(_as_shown, texts)))
    return {split: sorted(texts) for split, texts in strings.items()}


def _as_shown(text: str) -> str:
    """``text`` without context, mnemonics, tags and placeholders; "" for what is too short or too long to be read."""
    text = re.sub(r"<[^>]*>", " ", text.split("\x04")[-1])
    text = re.sub(r"%(\d+\$)?[-+#0 ]*\d*(\.\d+)?(hh|h|ll|l|j|z)?[a-zA-Z]|\{\w*\}", "12", text).replace("_", "")
    text = " ".join(text.split())
    return text if 6 <= len(text) <= 160 and sum(map(str.isalpha, text)) > len(text) / 2 else ""


def readme_paragraphs(folder: Path) -> dict[str, list[str]]:
    """The first 140 characters of the paragraphs of README files, by split."""
    paragraphs: dict[str, set[str]] = {"validation": set(), "test": set()}
    for path in sorted(folder.glob("*/README*")):
        if path.is_file() and path.suffix != ".gz":
            for part in re.split(r"\n\s*\n", path.read_text(encoding="utf-8", errors="ignore")):
                text = " ".join(part.split())[:140]
                if len(text) > 60 and sum(map(str.isalpha, text)) > len(text) / 2:
                    paragraphs[split_of(path.parent.name)].add(text)
    return {split: sorted(texts) for split, texts in paragraphs.items()}


def draw(texts: Iterable[str], count: int) -> list[str]:
    pool = list(texts)
    random.Random(28).shuffle(pool)
    return pool[:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--injections", type=Path, required=True)
    parser.add_argument("--locale", type=Path, default=Path("/usr/share/locale"))
    parser.add_argument("--doc", type=Path, default=Path("/usr/share/doc"))
    parser.add_argument("--out", type=Path, default=Path("runs/heldout-text.json"))
    arguments = parser.parse_args()
    screens, pages = interface_strings(arguments.locale), readme_paragraphs(arguments.doc)
    texts = {
        "instructions": injections(arguments.injections),
        **{
            split: {"screens": draw(screens[split], 4_000), "documents": draw(pages[split], 1_000)} for split in screens
        },
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(texts, ensure_ascii=False), encoding="utf-8")
    for name, kinds in texts.items():
        print(name, {kind: len(items) for kind, items in kinds.items()})


if __name__ == "__main__":
    main()
