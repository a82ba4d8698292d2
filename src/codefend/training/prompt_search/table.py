"""The collaboration table: purifiers x prompt policies x attacks x tasks, and whether pairs beat each of the two alone.

Attacks go through the bare victim (T0), so that every cell has the same attacked images, or through each cell's own
purifier and policy (T2). Policies are frozen before they are compared.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from codefend import prompts
from codefend.bench.results import BARE
from codefend.core.progress import progress
from codefend.core.runs import Row, Run, check_run, open_run, plain
from codefend.core.specs import split_specs
from codefend.prompts.answers import AnswerCache
from codefend.prompts.items import Item, is_refusal
from codefend.prompts.policy import Policy, attach
from codefend.purifiers.base import Purifier
from codefend.tasks.metrics import bootstrap_interval
from codefend.training.prompt_search.bank import (
    AttackConfig,
    ItemBuilder,
    SearchLoaders,
    check_attacks,
    load_crafter,
    load_purifiers,
)
from codefend.types import CodefendError, Task, Victim

TIMED = 6  # items per policy whose answers are timed one by one


@dataclass(frozen=True)
class TableConfig:
    """What is compared. ``prompts`` are names, files or folders; "none" is the baseline of both lists."""

    victim: str = "pocket"
    surrogate: str = ""
    tasks: tuple[str, ...] = ("caption", "vqa")
    purifiers: tuple[str, ...] = (BARE, "diffpure", "bridge")
    prompts: tuple[str, ...] = ("none", "adashield-static")
    seen: tuple[str, ...] = ("feature", "word-head")
    unseen: tuple[str, ...] = ("feature-target", "apgd-targeted", "mifgsm")
    joint: tuple[str, ...] = ("planted", "joint-targeted")
    split: str = "test"
    scenes: int = 32  # images per task, the first ones
    threat: Literal["T0", "T2"] = "T0"
    batch: int = 8
    attack: AttackConfig = field(default_factory=AttackConfig)

    def __post_init__(self) -> None:
        object.__setattr__(self, "purifiers", split_specs(self.purifiers))

    def groups(self) -> dict[str, tuple[str, ...]]:
        """Columns of the table, and the attacks that each averages."""
        attacked = {"seen": self.seen, "unseen": self.unseen, "joint": self.joint}
        named = {name: families for name, families in attacked.items() if families}
        return {"clean": ("clean",), **named, "look-alikes": ("benign",)}


Scores = dict[tuple[str, str, str, str], Tensor]  # (purifier, prompt, task, group) -> [N], one per example


def make_table(config: TableConfig, folder: Path, *, loaders: SearchLoaders | None = None) -> Row:
    """Fill ``folder`` with answers and return the table, also written as ``table.json``; the same call resumes.

    Raises CodefendError for unknown names, for lists without "none", for an attack that is named twice, or a folder
    made with another config.
    """
    for name, labels in (("purifiers", config.purifiers), ("prompts", config.prompts)):
        if BARE not in labels:
            raise CodefendError(f"{name} must hold 'none': the others are compared with it")
    check_attacks((*config.seen, *config.unseen, *config.joint), config.attack, "attack")
    loaders = loaders or SearchLoaders()
    policies = {name: prompts.load_any(name) for name in config.prompts}
    recorded = {"table": "prompts", **plain(config), "frozen": {name: p.key for name, p in policies.items()}}
    check_run(folder, recorded)
    tasks = [loaders.task(name, config.split, config.scenes) for name in config.tasks]
    purifiers = load_purifiers(config.purifiers, loaders)
    victim = loaders.victim(config.victim)
    attacks = {"seen": config.seen, "unseen": config.unseen, "joint": config.joint}
    crafter = load_crafter(victim, config.surrogate, loaders, attacks)
    with open_run(folder, recorded) as run:
        items = _items(config, run, crafter, tasks, purifiers, policies)
        cache = AnswerCache(victim, run, batch=config.batch)
        with progress("answers", sum(map(len, items.values()))) as advance:
            cache.on_answers = advance
            answers = {name: cache.answers(policy, items[name]) for name, policy in policies.items()}
        seconds = {name: _latency(run, victim, name, policy, items[name]) for name, policy in policies.items()}
        table = summarize(config, items, answers, seconds)
        run.write("table.json", json.dumps(plain(table), indent=2) + "\n")
        return table


def _items(
    config: TableConfig,
    run: Run,
    crafter: Victim,
    tasks: Sequence[Task],
    purifiers: Mapping[str, Purifier | None],
    policies: Mapping[str, Policy],
) -> dict[str, list[Item]]:
    """The items by policy; at T0 they are the same for all policies."""
    attacks = [*config.seen, *config.unseen, *config.joint]

    def build(policy: Policy | None) -> list[Item]:
        builder = ItemBuilder(crafter, purifiers, run.dir / "bank", config.attack, policy)
        items: list[Item] = []
        for task in tasks:
            items += builder.items(config.split, task, attacks)
            advance()
        return items

    adaptive = config.threat == "T2"
    with progress("examples", len(tasks) * (len(policies) if adaptive else 1)) as advance:
        if adaptive:
            return {name: build(policy) for name, policy in policies.items()}
        return dict.fromkeys(policies, build(None))


def _latency(run: Run, victim: Victim, name: str, policy: Policy, items: Sequence[Item]) -> float:
    """Median seconds of an answer in a batch of one, including the policy's own time; measured once per run."""
    key = f"latency|{name}"
    if not run.has(key):
        attached, times = attach(victim, policy), []
        questions = list({item.prompt: item for item in items if item.group == "benign"}.values())[: TIMED + 1]
        for item in questions:
            start = time.perf_counter()
            attached.generate(item.image[None], [policy(f"{item.prompt} ")])  # the space keeps it from the cache
            times.append(time.perf_counter() - start)
        run.append({"key": key, "kind": "latency", "seconds": statistics.median(times[1:] or times)})
    return float(next(row["seconds"] for row in run.rows() if row.get("key") == key))


def summarize(
    config: TableConfig,
    items: Mapping[str, Sequence[Item]],
    answers: Mapping[str, Sequence[str]],
    seconds: Mapping[str, float],
) -> Row:
    """Cells (mean and interval per group and task), refusals, latency, and the interaction of every pair."""
    scores = _scores(config, items, answers)
    cells = []
    for purifier, prompt in product(config.purifiers, config.prompts):
        refusals = [
            is_refusal(answer)
            for item, answer in zip(items[prompt], answers[prompt], strict=True)
            if item.variant == purifier and item.group != "attacked"
        ]
        cells.append(
            {
                "purifier": purifier,
                "prompt": prompt,
                "scores": {
                    task: {group: _interval(scores[purifier, prompt, task, group]) for group in config.groups()}
                    for task in config.tasks
                },
                "refusals": statistics.fmean(refusals),
                "clean_cost": _clean_cost(scores, config, purifier, prompt),
                "added_latency": seconds[prompt] / seconds[BARE] - 1,
            }
        )
    return {"cells": cells, "interaction": interactions(config, scores)}


def _scores(config: TableConfig, items: Mapping[str, Sequence[Item]], answers: Mapping[str, Sequence[str]]) -> Scores:
    values: dict[tuple[str, str, str, str], dict[str, list[float]]] = {}
    group_of = {family: group for group, families in config.groups().items() for family in families}
    for prompt, texts in answers.items():
        for item, answer in zip(items[prompt], texts, strict=True):
            cell = values.setdefault((item.variant, prompt, item.task, group_of[item.family]), {})
            cell.setdefault(item.id.rpartition("/")[2], []).append(item.judge(answer))
    return {
        key: torch.tensor([statistics.fmean(example) for _, example in sorted(cell.items())])
        for key, cell in values.items()
    }


def _interval(scores: Tensor) -> Row:
    return bootstrap_interval(scores)._asdict()


def _clean_cost(scores: Scores, config: TableConfig, purifier: str, prompt: str) -> float:
    """The clean score that the prompt costs behind this purifier, mean over tasks."""
    costs = [
        float((scores[purifier, BARE, task, "clean"] - scores[purifier, prompt, task, "clean"]).mean())
        for task in config.tasks
    ]
    return statistics.fmean(costs)


def interactions(config: TableConfig, scores: Scores) -> list[Row]:
    """For each purifier with each prompt: the pair minus either alone, and its gain beyond the sum of both gains.

    ``beyond_sum`` is s(P, Q) - s(P) - s(Q) + s(none): above 0 the two reinforce each other, at 0 they only add up.
    Each interval has confidence 95% by itself, not all together.
    """
    rows: list[Row] = []
    purifiers, policies = ([name for name in names if name != BARE] for names in (config.purifiers, config.prompts))
    for task, group, purifier, prompt in product(config.tasks, config.groups(), purifiers, policies):
        pair, neither = scores[purifier, prompt, task, group], scores[BARE, BARE, task, group]
        purified, prompted = scores[purifier, BARE, task, group], scores[BARE, prompt, task, group]
        rows.append(
            {
                "task": task,
                "group": group,
                "purifier": purifier,
                "prompt": prompt,
                "over_purifier": _interval(pair - purified),
                "over_prompt": _interval(pair - prompted),
                "beyond_sum": _interval(pair - purified - prompted + neither),
            }
        )
    return rows


def markdown(table: Row) -> str:
    """Markdown: one line per cell, then one line per pair."""
    tasks = list(table["cells"][0]["scores"])
    groups = list(table["cells"][0]["scores"][tasks[0]])
    heads = [f"{task} {group}" for task in tasks for group in groups]
    lines = [f"| purifier | prompt | {' | '.join(heads)} | refusals | clean cost | latency |"]
    lines.append("|" + "---|" * (len(heads) + 5))
    for cell in table["cells"]:
        means = [f"{cell['scores'][task][group]['mean']:.2f}" for task in tasks for group in groups]
        tail = f"{cell['refusals']:.1%} | {cell['clean_cost']:+.1%} | {cell['added_latency']:+.0%}"
        lines.append(f"| {cell['purifier']} | {cell['prompt']} | {' | '.join(means)} | {tail} |")
    lines += [
        "",
        "| task | attacks | pair | minus purifier | minus prompt | beyond the sum |",
        "|---|---|---|---|---|---|",
    ]
    for row in table["interaction"]:
        numbers = " | ".join(_signed(row[name]) for name in ("over_purifier", "over_prompt", "beyond_sum"))
        lines.append(f"| {row['task']} | {row['group']} | {row['purifier']} + {row['prompt']} | {numbers} |")
    return "\n".join(lines) + "\n"


def _signed(interval: Row) -> str:
    return f"{interval['mean']:+.2f} [{interval['low']:+.2f}, {interval['high']:+.2f}]"
