"""Texts for `benchmarks/written_text.py` by authors that no training and no threshold has seen.

    pip download --no-deps bastioncorpus==0.6.0 && unzip bastioncorpus-*.whl -d sources
    python benchmarks/fresh_text.py sources --out runs/fresh-text.json
    python benchmarks/written_text.py shares --texts runs/fresh-text.json

``sources`` holds, each where it is named; all are read and none is stored in the repository. ``--set first``:

- `bastioncorpus/corpus/injections.jsonl`: the English texts of the PyPI package bastioncorpus (MIT), both labels.
- `wasp.json`: `webarena_prompt_injections/configs/experiment_config.raw.json` of WASP (CC-BY-NC-4.0, for evaluation).
- `tensor-trust.jsonl`: the hijacking benchmark of Tensor Trust (no licence stated, for evaluation).
- `recipes/`: the Markdown files of based.cooking (public domain), which are full of imperatives.
- `govuk/`: the Markdown files of govuk-design-system (MIT): pages on forms, errors and buttons.
- `notinject/`: NotInject's JSON files (MIT): harmless requests with words that injections use, a text each.

``--set second``:

- `spikee/`: `data/workspace/datasets` of the PyPI package spikee 0.9.2 (Apache-2.0): each jailbreak of three sets of
  seeds with one of their English instructions.
- `pincer/`: `src/lib/attacks` of rustyorb/pincer (MIT): injection, extraction and tool abuse.
- `proventra.py`: `benchmark/data/test_data.py` of proventra-core (MIT), both labels.
- `nhs/`: `app/views` of nhsuk-service-manual (MIT): how to design, write and test pages.
- `guides/`: `_articles/*.md` of opensource.guide (CC-BY-4.0).

``--set third``:

- `agentseal/`: the PyPI package agentseal 0.10.0 (FSL-1.1, for evaluation): payloads of its probes that are one text.
- `promptmap/`: `rules` of utkusen/promptmap (GPL-3.0, for evaluation): distraction, jailbreak and prompt stealing.
- `payloads.md`: `Prompt Injection/README.md` of swisskyrepo/PayloadsAllTheThings (MIT): its blocks of code.
- `gnome-help/`: the pages of Debian's gnome-user-docs 43.0 (CC-BY-SA-3.0, for evaluation): help for users of a desktop.
- `owasp/`: `cheatsheets` of OWASP/CheatSheetSeries (CC-BY-SA-4.0, for evaluation) without those on AI, LLMs and MCP,
  which quote injections: advice on security.
- `basecamp/`: basecamp/handbook (for evaluation): advice to employees.
- `playbook/`: `en` and `views-vues/standards-normes/en` of canada-ca/digital-playbook-guide-numerique (OGL-Canada).

Injections of more than `LONGEST` characters (the second and third set: twice that), and those with characters outside
ASCII, are left out.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

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


def paragraphs(folder: Path, pattern: str = "*.md", without: str = "$^") -> list[str]:
    """The starts of paragraphs and list items, without markup, of Markdown, templates or Mallard pages without `info`.

    Files whose name matches ``without`` are left out.
    """
    texts: set[str] = set()
    for path in sorted(path for path in folder.rglob(pattern) if not re.search(without, path.name)):
        text = re.sub(r"\A---.*?^---$", "", path.read_text(encoding="utf-8", errors="ignore"), flags=re.S | re.M)
        text = re.sub(
            r"```.*?```|<info>.*?</info>|<[^>]*>|\{[%{].*?[%}]\}|!?\[|\]\([^)]*\)|[`*#|]", " ", text, flags=re.S
        )
        for part in re.split(r"\n\s*\n|\n\s*(?:-|\d+\.)\s", text):
            short = " ".join(part.split())[:PARAGRAPH]
            if len(short) > 25 and sum(map(str.isalpha, short)) > 0.6 * len(short):
                texts.add(short)
    return sorted(texts)


def legible(texts: Iterable[str], longest: int = LONGEST) -> list[str]:
    """Different texts of ASCII characters that fit on an image, in an order of chance."""
    fitting = sorted({short for text in texts if (short := " ".join(text.split())).isascii() and len(short) <= longest})
    random.Random(28).shuffle(fitting)
    return fitting


def spikee(folder: Path) -> list[str]:
    """Every jailbreak with an English instruction of its own set."""
    rng, texts = random.Random(28), []
    for seeds in ("seeds-cybersec-2026-01", "seeds-llm-mailbox", "seeds-sysmsg-extraction-2025-04"):
        goals = [row["instruction"] for row in lines(folder / seeds / "instructions.jsonl") if "lang" not in row]
        for row in lines(folder / seeds / "jailbreaks.jsonl"):
            texts.append(row["text"].replace("<INSTRUCTION>", rng.choice(goals)))
    return texts


def pincer(folder: Path) -> list[str]:
    """The strings after `prompt:` in the files of attacks that an image could hold."""
    names = ("injection", "extraction", "tool-abuse")
    code = "".join((folder / f"{name}.ts").read_text(encoding="utf-8") for name in names)
    found = re.findall(r'prompt:\s*(?:"((?:[^"\\]|\\.)*)"|`((?:[^`\\]|\\.)*)`)', code)
    return [re.sub(r"\\(.)", lambda match: " " if match[1] == "n" else match[1], a or b) for a, b in found]


def proventra(path: Path, name: str) -> list[str]:
    """The texts of the list that is assigned to ``name``."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    values = [item.value for item in body if isinstance(item, ast.Assign) and ast.unparse(item.targets[0]) == name]
    return [row["text"] for row in ast.literal_eval(values[0])]


def agentseal(folder: Path) -> list[str]:
    """The payloads of the probes, with a word in the place of the canary."""
    texts = []
    for name in ("injection", "extraction"):
        for node in ast.walk(ast.parse((folder / f"probes/{name}.py").read_text(encoding="utf-8"))):
            pairs = zip(node.keys, node.values, strict=True) if isinstance(node, ast.Dict) else ()
            texts += [_text(value) for key, value in pairs if isinstance(key, ast.Constant) and key.value == "payload"]
    return [text for text in texts if text]


def _text(node: ast.expr) -> str:
    """A string, whose parts may be joined by "+" or hold values; "" for another expression."""
    if isinstance(node, ast.BinOp):
        return _text(node.left) + _text(node.right)
    if isinstance(node, ast.JoinedStr):
        return "".join("OK17" if isinstance(part, ast.FormattedValue) else _text(part) for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def promptmap(folder: Path) -> list[str]:
    """The prompts of the rules that change what a model does."""
    kinds = ("distraction", "jailbreak", "prompt_stealing")
    paths = [path for kind in kinds for path in sorted((folder / kind).glob("*.yaml"))]
    return [str(yaml.safe_load(path.read_text(encoding="utf-8"))["prompt"]) for path in paths]


def code_blocks(path: Path) -> list[str]:
    return re.findall(r"```\w*\n(.*?)```", path.read_text(encoding="utf-8"), re.S)


def collect_third(sources: Path) -> dict[str, dict[str, list[str]]]:
    instructions = {
        "probes (agentseal)": agentseal(sources / "agentseal"),
        "rules (promptmap)": promptmap(sources / "promptmap"),
        "payloads (PayloadsAllTheThings)": code_blocks(sources / "payloads.md"),
    }
    pages = {
        "desktop help (GNOME)": paragraphs(sources / "gnome-help", "*.page"),
        "security advice (OWASP)": paragraphs(sources / "owasp", without="LLM|AI|Prompt|MCP|Agent"),
        "employees (Basecamp)": paragraphs(sources / "basecamp"),
        "digital services (Canada)": paragraphs(sources / "playbook"),
    }
    groups = {"instructions": instructions, "test": pages}
    return {group: {kind: legible(t, 2 * LONGEST) for kind, t in kinds.items()} for group, kinds in groups.items()}


def collect_second(sources: Path) -> dict[str, dict[str, list[str]]]:
    instructions = {
        "seeds (spikee)": spikee(sources / "spikee"),
        "attacks (pincer)": pincer(sources / "pincer"),
        "attacks (proventra)": proventra(sources / "proventra.py", "PROMPT_INJECTION_ATTACKS"),
    }
    pages = {
        "service manual (NHS)": paragraphs(sources / "nhs", "*.njk"),
        "guides (opensource.guide)": paragraphs(sources / "guides"),
    }
    single = {"requests (proventra)": proventra(sources / "proventra.py", "LEGITIMATE_REQUESTS")}
    groups = {"instructions": instructions, "test": pages, "single": single}
    return {group: {kind: legible(t, 2 * LONGEST) for kind, t in kinds.items()} for group, kinds in groups.items()}


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


SETS = {"first": collect, "second": collect_second, "third": collect_third}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/fresh-text.json"))
    parser.add_argument("--set", choices=SETS, default="first")
    arguments = parser.parse_args()
    groups = SETS[arguments.set](arguments.sources)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(groups), encoding="utf-8")
    for name, kinds in groups.items():
        print(name, {kind: len(texts) for kind, texts in kinds.items()})


if __name__ == "__main__":
    main()
