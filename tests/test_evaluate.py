"""The grid on toys: what rows hold, that a killed run resumes to the same rows, and that nobody's word is trusted."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

import toys
from codefend import attacks, runs
from codefend.attacks import AttackSpec
from codefend.attacks.search import Trace
from codefend.evaluate import AttackChoice, DefenseChoice, EvalConfig, evaluate
from codefend.evaluate.bench import Examined, contender, open_bench
from codefend.evaluate.craft import Cell, curves, gradients, slug
from codefend.evaluate.loop import cells
from codefend.results import CLEAN
from codefend.runs import Row
from codefend.settings import override
from codefend.types import Budget, Example, Objective, Task, UserError

SMALL = EvalConfig(
    victim="toy",
    tasks=("questions",),
    defenses=("none", "smooth", "leaky"),
    attacks=("apgd",),
    steps=12,
    batch=5,
    panels=0,
)
TIMES = {"seconds", "purify_seconds", "generate_seconds"}


def run(folder: Path, config: EvalConfig = SMALL, victim: Any = None) -> list[Row]:
    return evaluate(config, folder, loaders=toys.loaders(victim))


def untimed(rows: list[Row]) -> list[Row]:
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def mean(rows: list[Row], field: str = "scores", **where: object) -> float:
    chosen = [row for row in rows if all(row[key] == value for key, value in where.items())]
    assert chosen
    return sum(row[field][row["headline"]] for row in chosen) / len(chosen)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    return run(tmp_path_factory.mktemp("grid"))


# What the rows say


def test_grid_tells_oblivious_from_adaptive(rows: list[Row]) -> None:
    assert mean(rows, attack=CLEAN) == 1
    assert mean(rows, defense="none", attack="apgd") == 0
    assert mean(rows, defense="leaky", threat="T0") == 1
    assert mean(rows, defense="leaky", threat="T2") == 0  # only an attacker who looks through it finds the leak
    assert mean(rows, defense="smooth", threat="T2") == 1


def test_every_cell_has_every_example_once(rows: list[Row]) -> None:
    assert len({row["key"] for row in rows}) == len(rows) == 12 * (3 + 3 + 2)  # clean, T0, T2 without the bare victim
    assert {row["threat"] for row in rows if row["defense"] == "none"} == {"clean", "T0"}


def test_row_explains_itself(rows: list[Row]) -> None:
    row = next(r for r in rows if (r["defense"], r["threat"]) == ("leaky", "T2"))
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
    found = run(tmp_path, replace(SMALL, threats=("T0",)))
    kept = sorted((tmp_path / "attacked").rglob("*.safetensors"))
    assert len(kept) == 3  # 12 examples in batches of 5, once and not per defense
    tensors, _ = runs.load_checkpoint(kept[0])
    assert tensors["images"].dtype == torch.uint8
    moved = {row["defense"]: row["perturbation"] for row in found if row["example"] == "q0" and row["attack"] == "apgd"}
    assert moved["none"] == moved["smooth"] == moved["leaky"]


def test_targeted_attack_has_its_own_denominator(tmp_path: Path) -> None:
    found = [row for row in run(tmp_path, replace(SMALL, attacks=("apgd-targeted",))) if row["defense"] == "none"]
    attacked = [row for row in found if row["attack"] != CLEAN]
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
    scores = [[row["scores"]["cider_d"] for row in found if row["attack"] == CLEAN] for found in (first, second)]
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
    found = run(tmp_path, replace(SMALL, defenses=(label, "smooth"), threats=("T2", "T2d"), steps=30))
    knowing = [row for row in found if row["threat"] == "T2d"]
    assert {row["defense"] for row in knowing} == {label}  # the other has no noise to know
    for row in knowing:  # what the attack saw is what is judged, apart from the rounding to 8 bits
        assert row["objective"]["defended"] == pytest.approx(row["curve"]["end"], rel=0.05, abs=0.02)
    guessing = [row for row in found if (row["threat"], row["defense"]) == ("T2", label)]
    assert sum(r["objective"]["defended"] for r in knowing) < sum(r["objective"]["defended"] for r in guessing)


def test_transfer_goes_through_the_surrogate(tmp_path: Path) -> None:
    config = replace(SMALL, defenses=("none", "leaky", "smooth"), threats=("T1",), surrogate="leaky")
    found = run(tmp_path, config)
    transferred = [row for row in found if row["threat"] == "T1"]
    assert {row["defense"] for row in transferred} == {"smooth"}
    # Rows of stripes, made against the surrogate, not the checkerboard that the bare victim falls for.
    assert transferred[0]["objective"]["bare"] > -1


def test_non_differentiable_defense_is_attacked_straight_through(tmp_path: Path) -> None:
    found = run(tmp_path, replace(SMALL, defenses=("rounded",), threats=("T2",)))
    assert mean(found, attack="apgd") == 0
    assert {row["gradient_kind"] for row in found if row["attack"] == "apgd"} == {"straight-through"}


def test_adaptive_part_can_be_smaller(tmp_path: Path) -> None:
    config = replace(SMALL, adaptive=("leaky",), adaptive_limit=3)
    found = run(tmp_path, config)
    adaptive = [row for row in found if row["threat"] == "T2"]
    assert [row["example"] for row in adaptive] == ["q0", "q1", "q2"]
    assert {row["defense"] for row in adaptive} == {"leaky"}


def test_feature_attacks_run(tmp_path: Path) -> None:
    config = replace(SMALL, attacks=("feature", "feature-target"), defenses=("none", "leaky"), batch=12)
    assert mean(run(tmp_path, config), defense="none", attack="feature") < 1


def test_l2_budget(tmp_path: Path) -> None:
    found = run(tmp_path, replace(SMALL, norm="l2", eps=(1.0,), defenses=("none",), threats=("T0",)))
    attacked = [row for row in found if row["attack"] != CLEAN]
    assert all(0.5 < row["perturbation"]["l2"] <= 1.0 + 1e-5 for row in attacked)
    assert attacked[0]["key"].split(" | ")[4] == "1"


def test_pictures_of_the_first_examples_are_kept(tmp_path: Path) -> None:
    found = run(tmp_path, replace(SMALL, panels=2, limit=4, threats=("T0",)))
    shown = [row for row in found if row["pictures"]]
    assert {row["example"] for row in shown} == {"q0", "q1"}
    assert all((tmp_path / path).is_file() for row in shown for path in row["pictures"].values())
    assert set(shown[0]["pictures"]) == {"clean", "purified"}
    assert set(shown[-1]["pictures"]) == {"attacked", "purified"}


def test_bench_file_knows_cost_and_size_of_the_run(tmp_path: Path, rows: list[Row]) -> None:
    run(tmp_path)
    known = json.loads((tmp_path / "bench.json").read_text())
    assert known["rows"] == len(rows)
    assert {c["defense"]: c["evaluations"] for c in known["costs"]} == {"none": 0, "smooth": None, "leaky": 1}
    assert known["costs"][1]["ms_per_image"] > 0
    assert known["tasks"]["questions"]["target"] == "blue"


# Killed and resumed


class Killed(BaseException):
    """What no code under test may catch."""


class Mortal(toys.ToyVictim):
    """Dies at its n-th answer."""

    def __init__(self, lives: int) -> None:
        super().__init__()
        self.lives = lives

    def generate(self, images: Tensor, prompts: Any) -> list[str]:
        if self.calls == self.lives:
            raise Killed
        return super().generate(images, prompts)


def test_killed_run_resumes_to_the_same_rows(tmp_path: Path) -> None:
    config = replace(SMALL, defenses=("none", "leaky", "jitter"), eot=2, resubmissions=2)
    whole = untimed(run(tmp_path / "whole", config))
    deaths = 0
    for lives in (2, 5, 9, 4):
        with pytest.raises(Killed):
            run(tmp_path / "cut", config, Mortal(lives))
        deaths += 1
    assert deaths == 4
    assert untimed(run(tmp_path / "cut", config)) == whole


def test_rows_lost_inside_a_batch_come_back_the_same(tmp_path: Path, rows: list[Row]) -> None:
    run(tmp_path)
    path = tmp_path / "rows.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:78]) + lines[78][:40])  # the middle of a batch, a torn line
    assert untimed(run(tmp_path)) == untimed(rows)
    assert run(tmp_path, victim=Mortal(0)) == runs.read_rows(path)  # complete: the victim isn't asked again


KILLED_AT_RANDOM = """
import os, random, signal, sys, time
sys.path.insert(0, sys.argv[1])
import torch._dynamo, torch.utils.flop_counter  # children inherit what is slow to import
import codefend.evaluate.loop, codefend.attacks.apgd
import test_evaluate as t

class Telling(t.toys.ToyVictim):
    def generate(self, images, prompts):
        os.write(tell, b"!")
        return super().generate(images, prompts)

wait, kills, sizes = random.Random(int(sys.argv[3])), 0, set()
rows = t.Path(sys.argv[2], "rows.jsonl")
while True:
    hear, tell = os.pipe()
    child = os.fork()
    if child == 0:
        t.run(rows.parent, victim=Telling())
        os._exit(0)
    os.close(tell)
    os.read(hear, 1)  # the first question, or the end
    time.sleep(wait.uniform(0.0, 0.15))
    os.kill(child, signal.SIGKILL)
    if os.waitpid(child, 0)[1] != signal.SIGKILL:  # it was done before
        break
    kills += 1
    sizes.add(rows.stat().st_size)
    os.close(hear)
print(kills, len(sizes))
"""


def test_kill_at_random_moments_loses_and_doubles_nothing(tmp_path: Path, rows: list[Row]) -> None:
    """The process dies wherever it happens to be: between rows, within a file, in an attack."""
    command = [sys.executable, "-c", KILLED_AT_RANDOM, str(Path(__file__).parent), str(tmp_path)]
    done = subprocess.run([*command, "2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kills, moments = map(int, done.stdout.split())
    assert kills >= 3
    assert moments >= 3  # some of them with part of the rows on disk
    assert untimed(run(tmp_path)) == untimed(rows)


def test_another_config_is_refused(tmp_path: Path) -> None:
    run(tmp_path, replace(SMALL, limit=2, threats=("T0",)))
    with pytest.raises(UserError, match="steps was 12, now 13"):
        run(tmp_path, replace(SMALL, limit=2, threats=("T0",), steps=13))


# Nobody's word is trusted


class Cheat:
    """Claims a budget and spends another."""

    name = "cheat"

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __call__(
        self, objective: Objective, images: Tensor, budget: Budget, *, generator: Generator | None = None
    ) -> Tensor:
        if self.kind == "far":
            return (images + 3 * budget.eps).clamp(0, 1)
        if self.kind == "outside":
            return torch.where(images > 0.79, images + 0.5, images)
        return torch.full_like(images, math.nan)


@pytest.mark.parametrize(("kind", "reason"), [("far", "away"), ("outside", "leaves"), ("nan", "not finite")])
def test_violation_is_flagged_and_the_judged_image_is_inside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, reason: str
) -> None:
    spec = AttackSpec("cheat", "", "", "white-box", lambda: Cheat(kind))
    monkeypatch.setitem(attacks.EVERY_ATTACK, "cheat", spec)
    found = run(tmp_path, replace(SMALL, attacks=("cheat",), defenses=("none",), threats=("T0",)))
    attacked = [row for row in found if row["attack"] == "cheat"]
    assert all(reason in row["violation"] for row in attacked)
    assert all(row["perturbation"]["linf"] <= 8 / 255 + 1e-6 for row in attacked)
    assert all(row["curve"] is None and row["gradient"] is None for row in attacked)  # it offers no hooks


def test_declarations_are_believed_only_against_the_defense() -> None:
    class Liar(toys.Rounded):
        differentiable = True

    class Modest(toys.Smooth):
        stochastic = False

        def __call__(self, images: Tensor, *, generator: Generator | None = None) -> Tensor:
            return images + 0.1 * torch.randn(images.shape, generator=generator)

    picture = toys.scene(1)[0][None]
    loaders = replace(toys.loaders(), purifier=lambda name, **options: {"liar": Liar(), "modest": Modest()}[name])
    assert contender("liar", loaders, picture).gradient == "straight-through"
    assert contender("modest", loaders, picture).randomized
    bare = contender("none", loaders, picture)
    assert bare.adaptive is bare.defense


# Small parts


def test_curves_tell_converged_from_falling() -> None:
    steps = torch.arange(51.0)
    falling, settled, broken = -steps, -steps.clamp_max(10), steps * math.nan
    first, second, third = curves(list(torch.stack([falling, settled, broken], 1)), 3)
    assert first is not None
    assert second is not None
    assert third is not None
    assert (first["start"], first["end"], first["converged"]) == (0.0, -50.0, False)
    assert second["converged"]
    assert second["late"] == 0
    assert third["start"] != third["start"]
    assert curves([torch.zeros(2)], 2) == [None, None]


def test_gradient_summary() -> None:
    trace = Trace()
    for step, norm in enumerate((0.0, 2.0, 4.0, 6.0)):
        trace.gradient(step, torch.tensor([norm]), torch.tensor([step]))
    assert gradients(trace, 1) == [{"min": 0.0, "max": 6.0, "median": 2.0, "zero_share": 0.25, "nonfinite": 6}]
    assert gradients(Trace(), 2) == [None, None]


def test_batches_keep_picture_sizes_apart() -> None:
    sizes = [8, 8, 8, 12, 12, 8]
    examples = [Example(str(i), torch.zeros(3, side, side), "?", ("a",)) for i, side in enumerate(sizes)]
    known = Examined.of(Task("mixed", examples, dict(toys.task("questions").metrics), "vqa_accuracy"))
    assert known.batches(2, None) == [[0, 1], [2], [3, 4], [5]]
    assert known.batches(2, 3) == [[0, 1], [2]]


def test_success_of_captions_without_tags_is_half_the_score_lost() -> None:
    known = Examined.of(replace(toys.task("captions"), metrics={"cider_d": toys.cider_d}, headline="cider_d"))
    assert known.judge == "cider_d"
    broken = known.broken(torch.tensor([1.0, 1.0, 0.05]), torch.tensor([0.4, 0.6, 0.0]))
    assert broken[:2].tolist() == [1.0, 0.0]
    assert broken[2].isnan()


def test_slugs_are_file_names_and_differ() -> None:
    labels = ["bridge", "bridge:evaluations=2", "bridge_evaluations=2", "../up", "8/255", ""]
    names = [slug(label) for label in labels]
    assert len(set(names)) == len(labels)
    assert all("/" not in name and not name.startswith(".") and name for name in names)


def test_spelling_of_defenses_and_attacks() -> None:
    config = override(
        EvalConfig(), {"attacks": "apgd:steps=9,restarts=3,square", "defenses": "none,diffpure:t=0.1,steps=5"}
    )
    assert config.attacks == ("apgd:steps=9,restarts=3", "square")
    assert config.defenses == ("none", "diffpure:t=0.1,steps=5")
    assert DefenseChoice.parse("diffpure:t=0.1,steps=5").options == {"t": 0.1, "steps": 5}
    assert DefenseChoice.parse("some/folder").name == "some/folder"
    choice = AttackChoice.parse(config.attacks[0], config)
    assert choice.steps == 9
    assert getattr(choice.build(), "restarts", None) == 3
    assert AttackChoice.parse("square", config).steps == 5000
    assert AttackChoice.parse("apgd", replace(config, restarts=2)).options == {"restarts": "2"}


def test_cells_put_clean_rows_first() -> None:
    listed = list(cells(replace(SMALL, eps=(4.0, 8.0))))
    assert [cell.attack for cell in listed[:4]] == [CLEAN] * 3 + ["apgd"]
    assert listed[3] == Cell("questions", "apgd", 4.0, "T0", "none")
    assert len(listed) == 3 + 2 * (3 + 2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"eps": (8 / 255,)}, "write 8, not"),
        ({"eps": (0.0,)}, "above 0"),
        ({"attacks": ("apdg",)}, "did you mean 'apgd'"),
        ({"attacks": ("apgd:stepz=3",)}, "stepz"),
        ({"attacks": ("apgd:steps=many",)}, "whole number"),
        ({"attacks": ("apgd", "apgd")}, "twice"),
        ({"defenses": ("nothing",)}, "unknown purifier"),
        ({"defenses": ()}, "defenses is empty"),
        ({"adaptive": ("jpeg",)}, "not among the defenses"),
        ({"threats": ("T1",)}, "surrogate"),
        ({"tasks": ("riddles",)}, "unknown task"),
        ({"batch": 0}, "batch must be 1 or more"),
    ],
)
def test_mistakes_are_found_before_a_folder_is_made(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        run(tmp_path / "run", replace(SMALL, **change))
    assert not (tmp_path / "run").exists()


def test_unusable_victims_and_tasks_are_named() -> None:
    with pytest.raises(UserError, match="only answers text"):
        open_bench(SMALL, toys.loaders(toys.BlackBox()))

    def changed(**values: Any) -> Any:
        return replace(toys.loaders(), task=lambda *_: replace(toys.task("questions"), **values))

    same = toys.task("questions", limit=1).examples[0]
    with pytest.raises(UserError, match="no examples"):
        open_bench(SMALL, changed(examples=[]))
    with pytest.raises(UserError, match="two examples called 'q0'"):
        open_bench(SMALL, changed(examples=[same, same]))
    with pytest.raises(UserError, match="no reference answer"):
        open_bench(SMALL, changed(examples=[replace(same, references=())]))
    with pytest.raises(UserError, match="needs a target sentence"):
        open_bench(replace(SMALL, attacks=("apgd-targeted",)), changed(target=""))


def test_importing_the_config_does_not_import_torch() -> None:
    code = "import sys, codefend.evaluate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=dict(os.environ)).returncode == 0
