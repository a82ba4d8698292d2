"""Train the classifier of instruction-like text and write `src/codefend/purifiers/instructions.json`.

    python tools/train_instructions.py HELDOUT.json [--check]

Instructions: the training and development phrases of `benchmarks/data/image_text_phrases.json` with their fillers,
sentences of its grammar, the planted and injected forms of the prompt attacks, and injections collected by others
(`benchmarks/data/public_injections.json`). Harmless text: the training phrases, the grammar's, and windows of the
descriptions and strings of the code of installed packages, half of them by name (the other half is for the test), and
of Python's reference manual.

The threshold is the lowest of which at most `PAGES_MARKED` of pages of four harmless validation texts are marked
(`benchmarks/heldout_text.py` writes the file; its test texts are not read here). ``--check`` prints and writes nothing.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import pydoc_data.topics
import random
import re
from functools import lru_cache
from importlib.metadata import Distribution, distributions
from itertools import product
from pathlib import Path
from string import Formatter

from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from codefend.attacks.prompt_injection import INJECTIONS, INSTRUCTIONS
from codefend.purifiers import instructions

ROOT = Path(__file__).parent.parent
PHRASES = json.loads((ROOT / "benchmarks/data/image_text_phrases.json").read_text(encoding="utf-8"))
PUBLIC = json.loads((ROOT / "benchmarks/data/public_injections.json").read_text(encoding="utf-8"))
OUT = ROOT / "src/codefend/purifiers/instructions.json"
SMALLEST = 0.04  # weight that is kept
PAGES_MARKED = 0.02  # an image has several windows, so false positives add up
PAGE = 4  # texts
WINDOWS = (140, 100, 60)  # characters of the parts of long texts


def fill(split: str) -> list[str]:
    """Every instruction of ``split`` with each of its fillers."""
    fillers = PHRASES["fillers"][split]
    filled = []
    for template in PHRASES["instructions"][split]:
        names = [name for _, name, _, _ in Formatter().parse(template) if name]
        for values in product(*(fillers[name] for name in names)):
            filled.append(template.format(**dict(zip(names, values, strict=True))))
    return filled


def published(rng: random.Random) -> list[str]:
    """Goals alone and in their wrappers, and other texts by others, with fillers drawn for what varies."""
    values = [value for name in ("s", "w", "u", "o") for value in PHRASES["fillers"]["train"][name]]
    wrapped = [form.replace("{goal}", goal) for form in PUBLIC["wrappers"] for goal in PUBLIC["goals"]]
    texts = [*PUBLIC["goals"] * 4, *wrapped, *PUBLIC["texts"] * 6]
    return [re.sub(r"\{x\}", lambda _: rng.choice(values), text) for text in texts * 2]


def _of_split(distribution: Distribution, split: str) -> bool:
    name = distribution.metadata["Name"]
    return (hashlib.sha256(name.encode()).digest()[0] % 2 == 0) == (split == "train") and not name.startswith(
        "codefend"
    )


def _packages(split: str) -> list[Distribution]:
    chosen = (item for item in distributions() if _of_split(item, split))
    return sorted(chosen, key=lambda item: item.metadata["Name"])


def documents(split: str) -> list[str]:
    """Windows of the descriptions of installed packages: a fixed half of the packages for each split."""
    windows = []
    for distribution in _packages(split):
        text = " ".join(re.sub(r"https?://\S+|[#*`|>\[\]-]+", " ", str(distribution.metadata.get_payload())).split())
        windows += _windows(text[:8_000])
    return windows


def _windows(text: str) -> list[str]:
    """Parts of 140, 100 and 60 characters in turn, of which most are letters."""
    parts, start = [], 0
    while start < len(text):
        parts.append(text[start : start + (length := WINDOWS[len(parts) % len(WINDOWS)])])
        start += length
    return [part for part in parts if sum(map(str.isalpha, part)) > 0.6 * len(part) > 20]


@lru_cache(maxsize=2)
def program_strings(split: str) -> list[str]:
    """Error messages, help texts and sentences of docstrings in the code of the same half of the packages."""
    texts: set[str] = set()
    for distribution in _packages(split):
        files = [path for path in distribution.files or () if path.suffix == ".py" and "test" not in str(path)]
        for path in random.Random(0).sample(files, min(len(files), 25)):
            try:
                tree = ast.parse(Path(str(path.locate())).read_text(encoding="utf-8"))
            except (OSError, SyntaxError, ValueError):
                continue
            strings = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
            sentences = (" ".join(part.split()) for text in strings for part in re.split(r"(?<=[.!?])\s|\n\s*\n", text))
            texts.update(part[:140] for part in sentences if part.count(" ") > 1 and len(part) < 400)
            texts.update(window for text in strings if len(text) > 200 for window in _windows(" ".join(text.split())))
    return random.Random(1).sample(sorted(texts), min(len(texts), 22_000))


def harmless(split: str) -> list[str]:
    return [phrase for kind in PHRASES["harmless"][split].values() for phrase in kind]


def sample(kind: str, count: int, rng: random.Random) -> list[str]:
    """Different sentences of the grammar of training text; ``kind`` is "instructions" or "harmless"."""
    grammar = PHRASES["grammar"][kind]

    def expand(text: str) -> str:
        return re.sub(r"\{(\w+)\}", lambda match: expand(rng.choice(grammar[match[1]])), text)

    return sorted({expand("{START}") for _ in range(count)})


def fit() -> dict[str, object]:
    rng, topics = random.Random(0), " ".join(" ".join(pydoc_data.topics.topics.values()).split())[:600_000]
    fillers = PHRASES["fillers"]["train"]
    forms = [
        form.format(prompt="", sentence=rng.choice(fillers["s"])).strip()
        for form in (*INSTRUCTIONS, *INJECTIONS)
        for _ in range(6)
    ]
    positive = [*fill("train"), *fill("development"), *forms, *published(rng), *sample("instructions", 24_000, rng)]
    short = [*harmless("train"), *(value for values in fillers.values() for value in values)]
    single = [*short * 4, *sample("harmless", 14_000, rng), *program_strings("train"), *_windows(topics)]
    joined = [" ".join(rng.sample(single, rng.randint(2, 5)))[:140] for _ in range(12_000)]  # lines of a page
    negative = [*single, *joined, *documents("train")]
    vectorizer = CountVectorizer(analyzer=instructions.features, binary=True, min_df=12)
    features = vectorizer.fit_transform([*positive, *negative])
    model = LogisticRegression(C=1.0, class_weight="balanced", max_iter=150)
    model.fit(features, [1] * len(positive) + [0] * len(negative))
    names = vectorizer.get_feature_names_out()
    weights = {str(n): round(float(w), 2) for n, w in zip(names, model.coef_[0], strict=True) if abs(w) >= SMALLEST}
    return {"bias": round(float(model.intercept_[0]), 3), "threshold": 0.5, "weights": weights}


def threshold(texts: dict[str, list[str]]) -> float:
    """The lowest threshold at which at most `PAGES_MARKED` of pages of `PAGE` harmless texts each are marked."""
    rng = random.Random(3)
    highest = []
    for items in texts.values():
        for _ in range(1_500):
            lines = rng.sample(items, PAGE)
            if not any(map(instructions.matches_rule, lines)):
                windows = [" ".join(lines[a:b]) for b in range(PAGE + 1) for a in range(b)]
                highest.append(
                    max(instructions.score(w) for w in windows if w in lines or len(w) <= instructions.WINDOW)
                )
    return round(sorted(highest)[-int(len(highest) * PAGES_MARKED) - 1] + 0.0005, 3)


def report() -> None:
    """Print the shares of the phrases' instructions that are found and of harmless test texts that are not."""
    kinds = {**PHRASES["harmless"]["test"], "descriptions": documents("test"), "code": program_strings("test")[:5_000]}
    judges = {
        "rules": instructions.matches_rule,
        "regression": instructions.matches_regression,
        "both": instructions.is_instruction,
    }
    phrases = fill("test")
    for name, judge in judges.items():
        counts = [f"instructions {sum(map(judge, phrases))}/{len(phrases)}"]
        counts += [f"{kind} {sum(map(judge, texts))}/{len(texts)}" for kind, texts in kinds.items()]
        print(f"{name}: {', '.join(counts)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("heldout", type=Path)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    if not arguments.check:
        model = fit()
        OUT.write_text(json.dumps(model, sort_keys=True) + "\n", encoding="utf-8")
        validation = json.loads(arguments.heldout.read_text(encoding="utf-8"))["validation"]
        model["threshold"] = threshold(validation)
        OUT.write_text(json.dumps(model, sort_keys=True) + "\n", encoding="utf-8")
        instructions._model.cache_clear()
    report()


if __name__ == "__main__":
    main()
