"""Train the classifier of instruction-like text and write `src/codefend/purifiers/instructions.json`.

    python tools/train_instructions.py [--check]

Instructions: the training and development phrases of `benchmarks/data/image_text_phrases.json` with their fillers,
sentences of its grammar, and the planted and injected forms of the prompt attacks. Harmless text: the training phrases,
the grammar's, and windows of the descriptions of installed packages, half of them by name; the other half is for the
test. ``--check`` prints the test figures and writes nothing.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import sys
from importlib.metadata import distributions
from itertools import product
from pathlib import Path
from string import Formatter

from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from codefend.attacks.prompt_injection import INJECTIONS, INSTRUCTIONS
from codefend.purifiers import instructions

ROOT = Path(__file__).parent.parent
PHRASES = json.loads((ROOT / "benchmarks/data/image_text_phrases.json").read_text(encoding="utf-8"))
OUT = ROOT / "src/codefend/purifiers/instructions.json"
THRESHOLD = 0.8  # of the regression's probability; an image has several windows, so false positives add up


def fill(split: str) -> list[str]:
    """Every instruction of ``split`` with each of its fillers."""
    fillers = PHRASES["fillers"][split]
    filled = []
    for template in PHRASES["instructions"][split]:
        names = [name for _, name, _, _ in Formatter().parse(template) if name]
        for values in product(*(fillers[name] for name in names)):
            filled.append(template.format(**dict(zip(names, values, strict=True))))
    return filled


def documents(split: str) -> list[str]:
    """Windows of the descriptions of installed packages: a fixed half of the packages for each split."""
    windows = []
    for distribution in sorted(distributions(), key=lambda item: item.metadata["Name"]):
        name = distribution.metadata["Name"]
        if (hashlib.sha256(name.encode()).digest()[0] % 2 == 0) != (split == "train") or name.startswith("codefend"):
            continue
        text = " ".join(re.sub(r"https?://\S+|[#*`|>\[\]-]+", " ", str(distribution.metadata.get_payload())).split())
        windows += [text[i : i + 100] for i in range(0, min(len(text), 8_000), 100)]
    return [window for window in windows if sum(map(str.isalpha, window)) > 40]


def harmless(split: str) -> list[str]:
    return [phrase for kind in PHRASES["harmless"][split].values() for phrase in kind]


def sample(kind: str, count: int, rng: random.Random) -> list[str]:
    """Different sentences of the grammar of training text; ``kind`` is "instructions" or "harmless"."""
    grammar = PHRASES["grammar"][kind]

    def expand(text: str) -> str:
        return re.sub(r"\{(\w+)\}", lambda match: expand(rng.choice(grammar[match[1]])), text)

    return sorted({expand("{START}") for _ in range(count)})


def fit() -> dict[str, object]:
    rng = random.Random(0)
    fillers = PHRASES["fillers"]["train"]
    forms = [
        form.format(prompt="", sentence=rng.choice(fillers["s"])).strip()
        for form in (*INSTRUCTIONS, *INJECTIONS)
        for _ in range(6)
    ]
    positive = [*fill("train"), *fill("development"), *forms, *sample("instructions", 20_000, rng)]
    short = [*harmless("train"), *(value for values in fillers.values() for value in values)]
    single = [*short * 4, *sample("harmless", 12_000, rng)]
    joined = [" ".join(rng.sample(single, rng.randint(2, 5)))[:140] for _ in range(12_000)]  # lines of a page
    negative = [*single, *joined, *documents("train")]
    vectorizer = CountVectorizer(analyzer=instructions.features, binary=True, min_df=8)
    features = vectorizer.fit_transform([*positive, *negative])
    model = LogisticRegression(l1_ratio=1, C=1.0, solver="liblinear", class_weight="balanced", random_state=0)
    model.fit(features, [1] * len(positive) + [0] * len(negative))
    names = vectorizer.get_feature_names_out()
    weights = {str(n): round(float(w), 3) for n, w in zip(names, model.coef_[0], strict=True) if abs(w) >= 0.0005}
    return {"bias": round(float(model.intercept_[0]), 3), "threshold": THRESHOLD, "weights": weights}


def report() -> None:
    """Print the shares of test instructions that are found and of harmless test texts that are not."""
    harmless_kinds = {**PHRASES["harmless"]["test"], "package descriptions": documents("test")}
    judges = {
        "rules": instructions.matches_rule,
        "regression": instructions.matches_regression,
        "both": instructions.is_instruction,
    }
    phrases = fill("test")
    for name, judge in judges.items():
        counts = [f"instructions {sum(map(judge, phrases))}/{len(phrases)}"]
        counts += [f"{kind} {sum(map(judge, texts))}/{len(texts)}" for kind, texts in harmless_kinds.items()]
        print(f"{name}: {', '.join(counts)}")


if __name__ == "__main__":
    if "--check" not in sys.argv[1:]:
        OUT.write_text(json.dumps(fit(), sort_keys=True) + "\n", encoding="utf-8")
    report()
