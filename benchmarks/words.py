"""Latency that a prompt policy adds to an answer of the pocket, on new harmless queries, with and without in turn."""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from codefend import prompts
from codefend.prompts.items import benign
from codefend.tasks import load as load_task
from codefend.victims import load as load_victim


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompt", default="generator-pocket")
    parser.add_argument("--queries", type=int, default=24, help="per task")
    args = parser.parse_args()
    torch.set_num_threads(1)
    victim, policy = load_victim("pocket"), prompts.load(args.prompt)
    for name in ("caption", "vqa"):
        bare, added, changed = [], [], 0
        for number, example in enumerate(load_task(name, split="val", limit=args.queries + 1).examples):
            query = f"{benign(example.prompt, number)}{' ' * (1 + number // 8)}"  # spaces: no cached answer
            start = time.perf_counter()
            victim.generate(example.image[None], [query])
            middle = time.perf_counter()
            words = policy(query)
            end = time.perf_counter()
            if number:  # the first is to warm up
                bare.append(middle - start)
                added.append(end - middle)
                changed += words != query
        print(
            f"{name}: an answer {1e3 * statistics.median(bare):.0f} ms, {args.prompt} "
            f"{1e3 * statistics.median(added):.1f} ms more, {sum(added) / sum(bare):+.1%} over {len(bare)} queries, "
            f"{changed} of which it changed"
        )


if __name__ == "__main__":
    main()
