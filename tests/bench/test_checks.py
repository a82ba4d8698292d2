"""Nobody's word is trusted; mistakes are found before anything is made; the small parts."""

from __future__ import annotations

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
from codefend import attacks
from codefend.attacks import AttackSpec
from codefend.attacks.trace import Trace
from codefend.bench import AttackChoice, DefenseChoice, EvalConfig
from codefend.bench.cells import Cell, slug
from codefend.bench.defenses import evaluated_defense
from codefend.bench.grid import grid
from codefend.bench.notes import curves, gradients
from codefend.bench.results import CLEAN
from codefend.bench.setup import open_bench
from codefend.bench.tasks import EvaluatedTask
from codefend.core.settings import override
from codefend.types import Budget, CodefendError, Example, Objective, Task
from evaluate_kit import SMALL, run

# Nobody's word is trusted


class Cheat:
    """Claims a budget and spends another."""

    def __init__(self, name: str, kind: str) -> None:
        self.name, self.kind = name, kind

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
    spec = AttackSpec("cheat", "", "", "white-box", Cheat, options={"kind": kind})
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

        def forward(self, images: Tensor, *, generator: Generator | None = None) -> Tensor:
            return images + 0.1 * torch.randn(images.shape, generator=generator)

    picture = toys.scene(1)[0][None]
    loaders = replace(toys.loaders(), purifier=lambda name, **options: {"liar": Liar(), "modest": Modest()}[name])
    assert evaluated_defense("liar", loaders, picture).gradient == "straight-through"
    assert evaluated_defense("modest", loaders, picture).randomized
    bare = evaluated_defense("none", loaders, picture)
    assert bare.differentiable is bare.defense


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
    known = EvaluatedTask.of(
        Task("mixed", examples, dict(toys.task("questions").metrics), "vqa_accuracy"), toys.ToyVictim()
    )
    assert known.batches(2, None) == [[0, 1], [2], [3, 4], [5]]
    assert known.batches(2, 3) == [[0, 1], [2]]


def test_success_of_captions_without_tags_is_half_the_score_lost() -> None:
    task = replace(toys.task("captions"), metrics={"cider_d": toys.cider_d}, headline="cider_d")
    known = EvaluatedTask.of(task, toys.ToyVictim())
    assert known.judge == "cider_d"
    broken = known.untargeted_success(torch.tensor([1.0, 1.0, 0.05]), torch.tensor([0.4, 0.6, 0.0]))
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
    listed = list(grid(open_bench(replace(SMALL, eps=(4.0, 8.0)), toys.loaders())))
    assert [cell.attack for cell in listed[:4]] == [CLEAN] * 3 + ["apgd"]
    assert listed[3] == Cell("questions", "apgd", 4.0, "T0", "none")
    assert len(listed) == 3 + 2 * (3 + 2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"eps": (8 / 255,)}, "write 8, not"),
        ({"eps": (0.0,)}, "above 0"),
        ({"eps": (math.nan,)}, "above 0 and finite, not nan"),
        ({"eps": (math.inf,), "norm": "l2"}, "above 0 and finite, not inf"),
        ({"attacks": ("apdg",)}, "did you mean 'apgd'"),
        ({"attacks": ("apgd:stepz=3",)}, "stepz"),
        ({"attacks": ("apgd:steps=many",)}, "whole number"),
        ({"attacks": ("apgd", "apgd")}, "twice"),
        ({"attacks": ("characters:edits=0",)}, "edits of attack 'characters' must be 1 or more, not 0"),
        ({"attacks": ("joint:rounds=0",)}, "rounds and queries of 1 or more, not 0, 40"),
        ({"attacks": ("typographic:size=0",)}, "a share above 0, to 1, not 0"),
        ({"attacks": ("apgd:steps=\u00b2",)}, "must be a whole number of 1 or more"),
        ({"attacks": ("words:edits=-1",)}, "edits of attack 'words' must be 1 or more, not -1"),
        ({"defenses": ("nothing",)}, "unknown purifier"),
        ({"defenses": ()}, "defenses is empty"),
        ({"adaptive": ("jpeg",)}, "not among the defenses"),
        ({"threats": ("T1",)}, "surrogate"),
        ({"tasks": ("riddles",)}, "unknown task"),
        ({"batch": 0}, "batch must be 1 or more"),
    ],
)
def test_mistakes_are_found_before_a_folder_is_made(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(CodefendError, match=words):
        run(tmp_path / "run", replace(SMALL, **change))
    assert not (tmp_path / "run").exists()


def test_unusable_victims_and_tasks_are_named() -> None:
    with pytest.raises(CodefendError, match="only answers text"):
        open_bench(SMALL, toys.loaders(toys.BlackBox()))

    def changed(**values: Any) -> Any:
        return replace(toys.loaders(), task=lambda *_: replace(toys.task("questions"), **values))

    same = toys.task("questions", limit=1).examples[0]
    with pytest.raises(CodefendError, match="no examples"):
        open_bench(SMALL, changed(examples=[]))
    with pytest.raises(CodefendError, match="two examples called 'q0'"):
        open_bench(SMALL, changed(examples=[same, same]))
    with pytest.raises(CodefendError, match="no reference answer"):
        open_bench(SMALL, changed(examples=[replace(same, references=())]))
    with pytest.raises(CodefendError, match="needs a target sentence"):
        open_bench(replace(SMALL, attacks=("apgd-targeted",)), changed(target=""))


def test_importing_the_config_does_not_import_torch() -> None:
    code = "import sys, codefend.bench; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=dict(os.environ)).returncode == 0
