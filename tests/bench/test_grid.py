"""The grid on toys, and what its rows hold."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import toys
from codefend.bench.grid import grid as grid_cells
from codefend.bench.results import CLEAN, Cell
from codefend.bench.setup import open_bench
from codefend.core.checkpoints import load_checkpoint
from codefend.core.runs import Row
from evaluate_kit import SMALL, mean, run


def test_oblivious_and_adaptive_attacks_differ(grid: list[Row]) -> None:
    assert mean(grid, attack=CLEAN) == 1
    assert mean(grid, defense="none", attack="apgd") == 0
    assert mean(grid, defense="leaky", threat="T0") == 1
    assert mean(grid, defense="leaky", threat="T2") == 0  # only an attack through it finds the leak
    assert mean(grid, defense="smooth", threat="T2") == 1


def test_every_cell_has_every_example_once(grid: list[Row]) -> None:
    assert len({row["key"] for row in grid}) == len(grid) == 12 * (3 + 3 + 2)  # clean, T0, T2 without the bare victim
    assert {row["threat"] for row in grid if row["defense"] == "none"} == {"clean", "T0"}


def test_a_row_holds_attack_budget_and_objective(grid: list[Row]) -> None:
    row = next(r for r in grid if (r["defense"], r["threat"]) == ("leaky", "T2"))
    assert row["clean_answer"] in row["references"]
    assert row["answer"] not in row["references"]
    assert row["success"] == {"untargeted": 1}
    assert row["perturbation"]["linf"] == pytest.approx(8 / 255, abs=1e-6)
    assert row["perturbation"]["psnr"] > 20
    assert row["objective"]["defended"] < row["objective"]["bare"]  # the bare victim doesn't fall for rows of stripes
    assert row["curve"]["end"] < row["curve"]["start"]
    assert row["gradient"]["min"] > 0
    assert row["gradient"]["nonfinite"] == 0
    assert row["budget"] == {"steps": 12, "eot": 1, "restarts": 1}
    assert row["violation"] == ""
    assert row["gradient_kind"] == "exact"
    assert row["seconds"] > 0


def test_all_defenses_are_judged_on_the_same_attacked_images(tmp_path: Path) -> None:
    rows = run(tmp_path, replace(SMALL, threats=("T0",)))
    files = sorted((tmp_path / "attacked").rglob("*.safetensors"))
    assert len(files) == 3  # 12 examples in batches of 5, once and not per defense
    tensors, _ = load_checkpoint(files[0])
    assert tensors["images"].dtype == torch.uint8
    first = [row for row in rows if row["example"] == "q0" and row["attack"] == "apgd"]
    perturbations = {row["defense"]: row["perturbation"] for row in first}
    assert perturbations["none"] == perturbations["smooth"] == perturbations["leaky"]


def test_targeted_attack_has_its_own_denominator(tmp_path: Path) -> None:
    rows = [row for row in run(tmp_path, replace(SMALL, attacks=("apgd-targeted",))) if row["defense"] == "none"]
    attacked = [row for row in rows if row["attack"] != CLEAN]
    answered_blue = [row for row in attacked if row["clean_answer"] == "blue"]
    assert answered_blue
    assert all(row["success"]["targeted"] is None for row in answered_blue)
    others = [row["success"]["targeted"] for row in attacked if row["clean_answer"] != "blue"]
    assert sum(others) > len(others) / 2
    assert attacked[0]["target"] == "blue"


def test_wrong_clean_answers_are_outside_the_untargeted_denominator(tmp_path: Path) -> None:
    class Wrong(toys.ToyVictim):
        def generate(self, images: Tensor, prompts: Any) -> list[str]:
            return ["nothing" if "left" in p else a for p, a in zip(prompts, super().generate(images, prompts))]  # noqa: B905

    attacked = [row for row in run(tmp_path, victim=Wrong()) if row["attack"] != CLEAN]
    left = [row for row in attacked if "left" in row["prompt"]]
    assert all(row["success"]["untargeted"] is None for row in left)
    assert all(row["skipped"] == (row["threat"] == "T2") for row in left)  # nothing left to break, but never at T0
    assert all(row["perturbation"]["linf"] > 0 for row in left if row["threat"] == "T0")
    assert all(row["success"]["untargeted"] is not None for row in attacked if "right" in row["prompt"])


def test_nothing_is_skipped_on_request(tmp_path: Path) -> None:
    class Wrong(toys.ToyVictim):
        def generate(self, images: Tensor, prompts: Any) -> list[str]:
            return ["nothing"] * len(prompts)

    config = replace(SMALL, skip_wrong=False, defenses=("none", "smooth"))
    assert not any(row["skipped"] for row in run(tmp_path, config, Wrong()) if row["attack"] != CLEAN)


def test_caption_scores_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    config = replace(SMALL, tasks=("captions",), defenses=("none",), threats=("T0",), steps=3)
    first, second = (run(tmp_path / str(size), replace(config, batch=size)) for size in (12, 5))
    scores = [[row["scores"]["cider_d"] for row in rows if row["attack"] == CLEAN] for rows in (first, second)]
    assert scores[0] == scores[1]
    assert min(scores[0]) > 0


def test_randomized_defense_is_submitted_n_times(tmp_path: Path) -> None:
    config = replace(SMALL, defenses=("jitter:sigma=0.6",), threats=("T0",), resubmissions=5, eot=3)
    attacked = [row for row in run(tmp_path, config) if row["attack"] != CLEAN]
    assert all(row["randomized"] and row["resubmissions"] == len(row["answers"]) == 5 for row in attacked)
    mixed = [row for row in attacked if len(set(row["answers"])) > 1]
    assert mixed
    for row in mixed:
        right = [float(answer in row["references"]) for answer in row["answers"]]
        assert row["mean_scores"]["vqa_accuracy"] == pytest.approx(sum(right) / 5)
        assert row["worst_scores"]["vqa_accuracy"] == min(right)
        assert row["scores"]["vqa_accuracy"] == right[0]
        assert row["success_any"]["untargeted"] in (None, 1 - int(min(right)))
    assert {row["budget"]["eot"] for row in attacked} == {1}  # the oblivious attack's objective isn't random


def test_adaptive_attack_averages_over_a_randomized_defense(tmp_path: Path) -> None:
    config = replace(SMALL, defenses=("jitter", "smooth"), threats=("T2",), eot=3)
    eot = {row["defense"]: row["budget"]["eot"] for row in run(tmp_path, config) if row["attack"] != CLEAN}
    assert eot == {"jitter": 3, "smooth": 1}


def test_known_seed_beats_fresh_noise(tmp_path: Path) -> None:
    label = "jitter:sigma=0.4"
    rows = run(tmp_path, replace(SMALL, defenses=(label, "smooth"), threats=("T2", "T2d"), steps=30))
    knowing = [row for row in rows if row["threat"] == "T2d"]
    assert {row["defense"] for row in knowing} == {label}  # the other has no noise to know
    for row in knowing:  # what the attack saw is what is judged, apart from the rounding to 8 bits
        assert row["objective"]["defended"] == pytest.approx(row["curve"]["end"], rel=0.05, abs=0.02)
    guessing = [row for row in rows if (row["threat"], row["defense"]) == ("T2", label)]
    assert sum(r["objective"]["defended"] for r in knowing) < sum(r["objective"]["defended"] for r in guessing)


def test_transfer_goes_through_the_surrogate(tmp_path: Path) -> None:
    config = replace(SMALL, defenses=("none", "leaky", "smooth"), threats=("T1",), surrogate="leaky")
    rows = run(tmp_path, config)
    transferred = [row for row in rows if row["threat"] == "T1"]
    assert {row["defense"] for row in transferred} == {"smooth"}
    # Rows of stripes, made against the surrogate, not the checkerboard that the bare victim falls for.
    assert transferred[0]["objective"]["bare"] > -1


def test_non_differentiable_defense_is_attacked_straight_through(tmp_path: Path) -> None:
    rows = run(tmp_path, replace(SMALL, defenses=("rounded",), threats=("T2",)))
    assert mean(rows, attack="apgd") == 0
    assert {row["gradient_kind"] for row in rows if row["attack"] == "apgd"} == {"straight-through"}


def test_adaptive_part_can_be_smaller(tmp_path: Path) -> None:
    config = replace(SMALL, adaptive=("leaky",), adaptive_limit=3)
    rows = run(tmp_path, config)
    adaptive = [row for row in rows if row["threat"] == "T2"]
    assert [row["example"] for row in adaptive] == ["q0", "q1", "q2"]
    assert {row["defense"] for row in adaptive} == {"leaky"}


def test_feature_attacks_run(tmp_path: Path) -> None:
    config = replace(SMALL, attacks=("feature", "feature-target"), defenses=("none", "leaky"), batch=12)
    assert mean(run(tmp_path, config), defense="none", attack="feature") < 1


def test_l2_budget(tmp_path: Path) -> None:
    rows = run(tmp_path, replace(SMALL, norm="l2", eps=(1.0,), defenses=("none",), threats=("T0",)))
    attacked = [row for row in rows if row["attack"] != CLEAN]
    assert all(0.5 < row["perturbation"]["l2"] <= 1.0 + 1e-5 for row in attacked)
    assert attacked[0]["key"].split(" | ")[4] == "1"


def test_images_of_the_first_examples_are_stored(tmp_path: Path) -> None:
    rows = run(tmp_path, replace(SMALL, panels=2, limit=4, threats=("T0",)))
    stored = [row for row in rows if row["pictures"]]
    assert {row["example"] for row in stored} == {"q0", "q1"}
    assert all((tmp_path / path).is_file() for row in stored for path in row["pictures"].values())
    assert set(stored[0]["pictures"]) == {"clean", "purified"}
    assert set(stored[-1]["pictures"]) == {"attacked", "purified"}


def test_bench_file_knows_cost_and_size_of_the_run(tmp_path: Path, grid: list[Row]) -> None:
    run(tmp_path)
    evaluated = json.loads((tmp_path / "bench.json").read_text())
    assert evaluated["rows"] == len(grid)
    assert {c["defense"]: c["evaluations"] for c in evaluated["costs"]} == {"none": 0, "smooth": 0, "leaky": 1}
    assert evaluated["costs"][1]["ms_per_image"] > 0
    assert evaluated["tasks"]["questions"]["target"] == "blue"


def test_cells_put_clean_rows_first() -> None:
    listed = list(grid_cells(open_bench(replace(SMALL, eps=(4.0, 8.0)), toys.loaders())))
    assert [cell.attack for cell in listed[:4]] == [CLEAN] * 3 + ["apgd"]
    assert listed[3] == Cell("questions", "apgd", 4.0, "T0", "none")
    assert len(listed) == 3 + 2 * (3 + 2)
