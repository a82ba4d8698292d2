"""Tasks under evaluation: batches, success, stratified subsets."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch

import toys
from codefend.bench.tasks import EvaluatedTask, stratified
from codefend.types import Example, Task
from evaluate_kit import SMALL, run


def test_a_batch_has_images_of_one_size() -> None:
    sizes = [8, 8, 8, 12, 12, 8]
    examples = [Example(str(i), torch.zeros(3, side, side), "?", ("a",)) for i, side in enumerate(sizes)]
    evaluated = EvaluatedTask.of(
        Task("mixed", examples, dict(toys.task("questions").metrics), "vqa_accuracy"), toys.ToyVictim()
    )
    assert evaluated.batches(2, None) == [[0, 1], [2], [3, 4], [5]]
    assert evaluated.batches(2, 3) == [[0, 1], [2]]


def test_success_of_captions_without_tags_is_half_the_score_lost() -> None:
    task = replace(toys.task("captions"), metrics={"cider_d": toys.cider_d}, headline="cider_d")
    evaluated = EvaluatedTask.of(task, toys.ToyVictim())
    assert evaluated.judge == "cider_d"
    broken = evaluated.untargeted_success(torch.tensor([1.0, 1.0, 0.05]), torch.tensor([0.4, 0.6, 0.0]))
    assert broken[:2].tolist() == [1.0, 0.0]
    assert broken[2].isnan()


def test_every_prefix_of_a_stratified_order_holds_each_stratum_in_proportion() -> None:
    image = torch.zeros(3, 4, 4)
    kinds = ["colour"] * 40 + ["count"] * 20 + ["place"] * 20  # in blocks: the first ten would be of one kind
    examples = [Example(f"e{i}", image, "?", ("a",), kind) for i, kind in enumerate(kinds)]
    task = Task("blocks", examples, {}, "m")
    for limit in (4, 8, 20, 40):
        counts = Counter(example.kind for example in stratified(task, limit).examples)
        assert all(abs(counts[kind] - limit * kinds.count(kind) / 80) < 1.01 for kind in set(kinds))
    whole, part = (stratified(task, limit).examples for limit in (None, 10))
    assert list(whole[:10]) == list(part)  # smaller subsets are part of larger ones
    assert {example.id for example in whole} == {example.id for example in examples}


def test_objects_in_the_image_are_strata_too() -> None:
    examples = [Example(f"e{i}", torch.zeros(3, 4, 4), "?", ("a",), tags=("x",) * (1 + (i >= 10))) for i in range(20)]
    counts = Counter(len(example.tags) for example in stratified(Task("t", examples, {}, "m"), 10).examples)
    assert set(counts.values()) == {5}


def test_a_stratified_run_records_its_examples(tmp_path: Path) -> None:
    config = replace(SMALL, sample="strata", limit=4, defenses=("none",), threats=("T0",), steps=2)
    rows = run(tmp_path, config)
    ids = json.loads((tmp_path / "bench.json").read_text())["tasks"]["questions"]["ids"]
    assert ids == list(dict.fromkeys(row["example"] for row in rows))
    assert ids != ["q0", "q1", "q2", "q3"]
    assert "sample" in json.loads((tmp_path / "config.json").read_text())


def test_configs_of_older_runs_have_no_sample() -> None:
    assert "sample" not in SMALL.recorded()
