"""Clean accuracy of a victim by task and kind of question, with 95% intervals.

    python benchmarks/clean.py VICTIM ROWS.jsonl TASK... [--limit N] [--stride K]

One JSON line per example is appended to ROWS.jsonl: rerun the command to resume and to print the table.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from codefend import tasks, victims
from codefend.tasks.intervals import bootstrap_interval
from codefend.types import Example, Task, Victim

METRICS = ("all_tags", "exact_tags", "vqa_accuracy", "names_class", "exact_match")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("victim")
    parser.add_argument("rows", type=Path)
    parser.add_argument("tasks", nargs="+")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--stride", type=int, default=1, help="take every Kth example only")
    arguments = parser.parse_args()
    victim = victims.load(arguments.victim)
    for name in arguments.tasks:
        evaluate(victim, tasks.load(name, limit=arguments.limit), arguments.rows, arguments.stride)
    print_table(read(arguments.rows))


def evaluate(victim: Victim, task: Task, path: Path, stride: int, batch: int = 16) -> None:
    """Append the rows that the file lacks."""
    known = {row["id"] for row in read(path) if row["task"] == task.name}
    missing: list[Example] = [e for e in list(task.examples)[::stride] if e.id not in known]
    for start in range(0, len(missing), batch):
        examples = missing[start : start + batch]
        answers = victim.generate(torch.stack([e.image for e in examples]), [e.prompt for e in examples])
        scores = {name: task.metrics[name](answers, examples).tolist() for name in METRICS if name in task.metrics}
        with path.open("a", encoding="utf-8") as file:
            for i, (example, answer) in enumerate(zip(examples, answers, strict=True)):
                row = {"task": task.name, "id": example.id, "kind": example.kind, "prompt": example.prompt}
                row |= {"answer": answer, "references": list(example.references)}
                file.write(json.dumps(row | {name: values[i] for name, values in scores.items()}) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def print_table(rows: list[dict[str, Any]]) -> None:
    groups: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for row in rows:
        for metric in METRICS:
            if metric in row:
                groups[row["task"], "all", metric].append(row[metric])
                groups[row["task"], str(row["kind"]), metric].append(row[metric])
    print("| task | kind | metric | mean | 95% interval | n |\n|---|---|---|---|---|---|")
    for (task, kind, metric), values in sorted(groups.items()):
        score = bootstrap_interval(torch.tensor(values))
        print(f"| {task} | {kind} | {metric} | {score.mean:.3f} | {score.low:.3f} to {score.high:.3f} | {score.n} |")


if __name__ == "__main__":
    main()
