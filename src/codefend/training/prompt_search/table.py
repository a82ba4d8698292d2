"""The collaboration table: purifiers x prompt policies x attacks x tasks, and whether the pair beats each alone.

Attacks go through the bare victim (T0), so that every cell meets the very same pictures, or through each cell's own
purifier and policy (T2). Policies are frozen before they come here.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from codefend import prompts
from codefend.core.runs import Row, Run, check_run, open_run, plain, progress
from codefend.core.specs import split_specs
from codefend.prompts.asking import Asker, Policy, prompted
from codefend.prompts.items import Item, is_refusal
from codefend.purifiers.base import Purifier
from codefend.tasks.metrics import Interval, bootstrap_interval
from codefend.training.prompt_search.bank import (
    BARE,
    AttackConfig,
    Kitchen,
    Sources,
    check_attack,
    check_families,
    white_box,
)
from codefend.types import CodefendError, Task, Victim

TIMED = 6  # items whose answers are timed one by one, per policy


@dataclass(frozen=True)
class TableConfig:
    """What is compared. ``prompts`` are names, files or folders; ``none`` (first) is compared with in both lists."""

    victim: str = "pocket"
    surrogate: str = ""
    tasks: tuple[str, ...] = ("caption", "vqa")
    purifiers: tuple[str, ...] = (BARE, "diffpure", "bridge")
    prompts: tuple[str, ...] = ("none", "adashield-static")
    seen: tuple[str, ...] = ("feature", "word-head")
    unseen: tuple[str, ...] = ("feature-target", "apgd-targeted", "mifgsm")
    joint: tuple[str, ...] = ("planted", "joint-targeted")
    split: str = "test"
    scenes: int = 32  # per task, the first ones
    threat: Literal["T0", "T2"] = "T0"
    batch: int = 8
    attack: AttackConfig = field(default_factory=AttackConfig)

    def __post_init__(self) -> None:
        object.__setattr__(self, "purifiers", split_specs(self.purifiers))

    def groups(self) -> dict[str, tuple[str, ...]]:
        """Columns of the table and the families that each averages."""
        attacked = {"seen": self.seen, "unseen": self.unseen, "joint": self.joint}
        named = {name: families for name, families in attacked.items() if families}
        return {"clean": ("clean",), **named, "look-alikes": ("benign",)}


Scores = dict[tuple[str, str, str, str], Tensor]  # (purifier, prompt, task, group) -> [N], one per example


def make_table(config: TableConfig, folder: Path, *, sources: Sources | None = None) -> Row:
    """Fill ``folder`` with answers and return the table, written as ``table.json`` too; the same call resumes.

    Raises CodefendError for unknown names, for lists without "none", for a family named twice, or a folder made with
    another config.
    """
    for name in ("purifiers", "prompts"):
        if BARE not in getattr(config, name):
            raise CodefendError(f"{name} must hold 'none': the others are compared with it")
    check_families((*config.seen, *config.unseen, *config.joint))
    check_attack(config.attack, "attack")
    sources = sources or Sources()
    policies = {name: prompts.load_any(name) for name in config.prompts}
    frozen = {name: policy.key for name, policy in policies.items()}
    described = {"table": "prompts", **plain(config), "frozen": frozen}
    check_run(folder, described)
    tasks = [sources.task(name, config.split, config.scenes) for name in config.tasks]
    purifiers = {name: None if name == BARE else sources.purifier(name) for name in config.purifiers}
    victim = sources.victim(config.victim)
    attacked = white_box(victim, config.surrogate, sources)
    with open_run(folder, described) as run:  # a misspelt name has left nothing behind
        items = _items(config, run, attacked, tasks, purifiers, policies)
        asker = Asker(victim, run, batch=config.batch)
        with progress("answers", sum(map(len, items.values()))) as advance:
            asker.watch = advance
            answers = {name: asker.answers(policy, items[name]) for name, policy in policies.items()}
        seconds = {name: _latency(run, victim, name, policy, items[name]) for name, policy in policies.items()}
        table = summarize(config, items, answers, seconds)
        run.write("table.json", json.dumps(plain(table), indent=2) + "\n")
        return table


def _items(
    config: TableConfig,
    run: Run,
    attacked: Victim,
    tasks: Sequence[Task],
    purifiers: dict[str, Purifier | None],
    policies: Mapping[str, Policy],
) -> dict[str, list[Item]]:
    """What each policy is asked: at T0 the same for all."""
    families = [*config.seen, *config.unseen, *config.joint]
    seen = policies if config.threat == "T2" else {"": None}
    made: dict[str, list[Item]] = {name: [] for name in seen}
    with progress("examples", len(tasks) * len(seen)) as advance:
        for name, policy in seen.items():
            kitchen = Kitchen(attacked, purifiers, run.dir / "bank", config.attack, policy)
            for task in tasks:
                made[name] += kitchen.items(config.split, task, families)
                advance()
    return {name: made.get(name, made.get("", [])) for name in policies}


def _latency(run: Run, victim: Victim, name: str, policy: Policy, items: Sequence[Item]) -> float:
    """Median seconds of one answer, asked alone, with the policy's own work; different questions, nothing kept."""
    key = f"latency|{name}"
    if not run.has(key):
        behind, times = prompted(victim, policy), []
        questions = list({item.prompt: item for item in items if item.group == "benign"}.values())[: TIMED + 1]
        for item in questions:
            start = time.perf_counter()
            behind.generate(item.image[None], [policy(f"{item.prompt} ")])  # the space: a query not met before
            times.append(time.perf_counter() - start)
        run.append({"key": key, "kind": "latency", "seconds": statistics.median(times[1:] or times)})
    found: float = next(row["seconds"] for row in run.rows() if row.get("key") == key)
    return found


def summarize(
    config: TableConfig,
    items: Mapping[str, Sequence[Item]],
    answers: Mapping[str, Sequence[str]],
    seconds: Mapping[str, float],
) -> Row:
    """Cells (mean and interval per group and task), refusals, latency, and the interaction of every pair."""
    scores = _scores(config, items, answers)
    cells = []
    for purifier in config.purifiers:
        for prompt in config.prompts:
            asked = [
                is_refusal(answer)
                for item, answer in zip(items[prompt], answers[prompt], strict=True)
                if item.variant == purifier and item.group != "attacked"
            ]
            found = {
                task: {group: _interval(scores[purifier, prompt, task, group]) for group in config.groups()}
                for task in config.tasks
            }
            cells.append(
                {
                    "purifier": purifier,
                    "prompt": prompt,
                    "scores": found,
                    "refusals": sum(asked) / len(asked),
                    "clean_cost": _cost(scores, config, purifier, prompt),
                    "added_latency": seconds[prompt] / seconds[BARE] - 1,
                }
            )
    return {"cells": cells, "interaction": interactions(config, scores)}


def _scores(config: TableConfig, items: Mapping[str, Sequence[Item]], answers: Mapping[str, Sequence[str]]) -> Scores:
    sums: dict[tuple[str, str, str, str], dict[str, list[float]]] = {}
    homes = {family: group for group, families in config.groups().items() for family in families}
    for prompt, given in answers.items():
        for item, answer in zip(items[prompt], given, strict=True):
            cell = sums.setdefault((item.variant, prompt, item.task, homes[item.family]), {})
            cell.setdefault(item.id.rpartition("/")[2], []).append(item.judge(answer))
    return {
        key: torch.tensor([statistics.fmean(values) for _, values in sorted(cell.items())])
        for key, cell in sums.items()
    }


def _interval(scores: Tensor) -> Row:
    return bootstrap_interval(scores)._asdict()


def _cost(scores: Scores, config: TableConfig, purifier: str, prompt: str) -> float:
    """How much clean score the prompt costs behind this purifier, mean of the tasks."""
    lost = [
        float((scores[purifier, BARE, task, "clean"] - scores[purifier, prompt, task, "clean"]).mean())
        for task in config.tasks
    ]
    return statistics.fmean(lost)


def interactions(config: TableConfig, scores: Scores) -> list[Row]:
    """For each purifier with each prompt: the pair minus either alone, and what it has beyond their sum.

    ``beyond_sum`` is s(P, Q) - s(P) - s(Q) + s(none): above 0 the two help one another, at 0 they only add up.
    """
    found = []
    for task in config.tasks:
        for group in config.groups():
            base = scores[BARE, BARE, task, group]
            for purifier in (name for name in config.purifiers if name != BARE):
                for prompt in (name for name in config.prompts if name != BARE):
                    pair, alone = scores[purifier, prompt, task, group], scores[purifier, BARE, task, group]
                    words = scores[BARE, prompt, task, group]
                    better = bootstrap_interval(pair - alone)
                    row: dict[str, Any] = {"task": task, "group": group, "purifier": purifier, "prompt": prompt}
                    row["over_purifier"] = better._asdict()
                    row["over_prompt"] = _interval(pair - words)
                    row["beyond_sum"] = _interval(pair - alone - words + base)
                    found.append(row | {"helps": _above_zero(better)})
    return found


def _above_zero(interval: Interval) -> bool:
    return interval.low > 0


def markdown(table: Row) -> str:
    """The table for a report: one line per cell, then one line per pair that was compared."""
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
        numbers = " | ".join(_span(row[name]) for name in ("over_purifier", "over_prompt", "beyond_sum"))
        lines.append(f"| {row['task']} | {row['group']} | {row['purifier']} + {row['prompt']} | {numbers} |")
    return "\n".join(lines) + "\n"


def _span(interval: Row) -> str:
    return f"{interval['mean']:+.2f} [{interval['low']:+.2f}, {interval['high']:+.2f}]"
