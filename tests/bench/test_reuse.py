"""Attacked images of an earlier run: the same rows without the attack, and every image verified."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import toys
from codefend.attacks.apgd import APGD
from codefend.bench import EvalConfig, evaluate
from codefend.core.checkpoints import load_checkpoint, save_checkpoint
from codefend.core.runs import Row
from codefend.types import CodefendError

FIRST = EvalConfig(
    victim="toy",
    tasks=("questions",),
    defenses=("none", "leaky"),
    attacks=("apgd",),
    steps=6,
    batch=5,
    limit=8,
    panels=0,
)
MORE = replace(FIRST, defenses=("none", "leaky", "smooth"), adaptive=("leaky",))
UNLIKE = {"seconds", "purify_seconds", "generate_seconds", "reused"}


def run(folder: Path, config: EvalConfig, victim: Any = None) -> list[Row]:
    return evaluate(config, folder, loaders=toys.loaders(victim))


def bare(rows: list[Row]) -> list[Row]:
    return [{key: value for key, value in row.items() if key not in UNLIKE} for row in rows]


@pytest.fixture(scope="module")
def donor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("donor")
    run(folder, FIRST)
    return folder


@pytest.fixture
def no_attack(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Tensor:
        raise AssertionError("an attack ran")

    monkeypatch.setattr(APGD, "__call__", refuse)


def altered(donor: Path, to: Path, where: str, change: Any) -> Path:
    """A copy of the donor whose attacked images and notes under ``where`` went through ``change``."""
    for path in donor.rglob("*"):
        if path.is_file():
            (to / path.relative_to(donor)).parent.mkdir(parents=True, exist_ok=True)
            (to / path.relative_to(donor)).write_bytes(path.read_bytes())
    changed = [path for path in to.rglob("*.safetensors") if where in path.as_posix()]
    assert changed
    for path in changed:
        tensors, state = load_checkpoint(path)
        images, notes = change(tensors["images"], state["notes"])
        save_checkpoint(path, {"images": images}, {"notes": notes})
    return to


def test_a_defense_added_later_costs_no_attack(donor: Path, tmp_path: Path, no_attack: None) -> None:
    rows = run(tmp_path / "new", replace(MORE, attacked=str(donor)))
    attacked = [row for row in rows if row["attack"] != "none"]
    assert {(row["defense"], row["threat"]) for row in attacked} >= {("smooth", "T0"), ("leaky", "T2")}
    assert all(row["reused"] for row in attacked)


def test_rows_are_those_of_a_run_that_attacked_itself(donor: Path, tmp_path: Path) -> None:
    shared = run(tmp_path / "shared", replace(MORE, attacked=str(donor)))
    assert bare(shared) == bare(run(tmp_path / "alone", MORE))
    assert not any(row.get("reused") for row in run(tmp_path / "alone", MORE))
    (tmp_path / "shared" / "rows.jsonl").write_text("")  # own copies: the other run may go
    again = run(tmp_path / "shared", replace(MORE, attacked=str(donor)))
    assert bare(again) == bare(shared)


def test_missing_images_are_made(donor: Path, tmp_path: Path) -> None:
    rows = run(tmp_path, replace(MORE, adaptive=("smooth",), attacked=str(donor)))
    reused = {row["threat"]: bool(row.get("reused")) for row in rows if row["attack"] != "none"}
    assert reused == {"T0": True, "T2": False}


@pytest.mark.parametrize("change", [{"steps": 7}, {"restarts": 2}, {"limit": 7}])
def test_images_of_another_budget_or_batch_are_made_again(donor: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    config = replace(FIRST, **change)
    rows = run(tmp_path / "new", replace(config, attacked=str(donor)))
    attacked = [row for row in rows if row["attack"] != "none"]
    whole_batches = "limit" in change  # the first batch of five is the same, the last one isn't
    assert [bool(row.get("reused")) for row in attacked] == [whole_batches and row["batch"] == 0 for row in attacked]
    assert bare(rows) == bare(run(tmp_path / "alone", config))


@pytest.mark.parametrize(
    "change", [{"victim": "other"}, {"seed": 1}, {"batch": 4}, {"split": "val"}, {"norm": "l2", "eps": (1.0,)}]
)
def test_a_run_with_other_settings_is_refused_by_name(donor: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    key = next(iter(change))
    with pytest.raises(CodefendError, match=f"made with {key}="):
        run(tmp_path / "new", replace(MORE, attacked=str(donor), **change))
    assert not (tmp_path / "new").exists()


def test_folders_without_usable_images(donor: Path, tmp_path: Path) -> None:
    with pytest.raises(CodefendError, match="not a run folder"):
        run(tmp_path / "new", replace(MORE, attacked=str(tmp_path / "nowhere")))
    with pytest.raises(CodefendError, match="own folder"):
        run(donor, replace(FIRST, attacked=str(donor)))


def test_a_victim_that_changed_under_its_name_is_detected(donor: Path, tmp_path: Path) -> None:
    with pytest.raises(CodefendError, match="another model, prompt or defense"):
        run(tmp_path / "new", replace(MORE, attacked=str(donor)), toys.ToyVictim(checker=150.0))


def test_a_defense_that_changed_under_its_name_is_detected(
    donor: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Retrained(toys.Leaky):
        def forward(self, images: Tensor, *, generator: Any = None) -> Tensor:
            return 0.9 * super().forward(images)

    monkeypatch.setitem(toys.PURIFIERS, "leaky", Retrained)
    with pytest.raises(CodefendError, match=r"T2-leaky.*another model, prompt or defense"):
        run(tmp_path / "new", replace(MORE, attacked=str(donor)))


def further(images: Tensor, notes: list[Row]) -> tuple[Tensor, list[Row]]:
    return (images.int() + 3).clamp(0, 255).to(torch.uint8), notes


def weaker(images: Tensor, notes: list[Row]) -> tuple[Tensor, list[Row]]:
    return images.flip(0), notes


def reseeded(images: Tensor, notes: list[Row]) -> tuple[Tensor, list[Row]]:
    return images, [note | {"seeds": {"config": 0, "attack": 1}} for note in notes]


@pytest.mark.parametrize(("change", "words"), [(further, "budget is"), (weaker, "budget is"), (reseeded, "seed")])
def test_images_are_verified(donor: Path, tmp_path: Path, change: Any, words: str) -> None:
    other = altered(donor, tmp_path / "other", "T0-none", change)
    with pytest.raises(CodefendError, match=f"cannot be used here.*{words}"):
        run(tmp_path / "new", replace(MORE, attacked=str(other)))


def test_clean_images_declared_as_attacked_are_detected(donor: Path, tmp_path: Path) -> None:
    clean = torch.stack([toys.task("questions").examples[i].image for i in range(8)])
    levels = (clean * 255).round().to(torch.uint8)

    def unattacked(images: Tensor, notes: list[Row]) -> tuple[Tensor, list[Row]]:
        return (levels[:5] if len(images) == 5 else levels[5:]), notes

    other = altered(donor, tmp_path / "other", "T0-none", unattacked)
    with pytest.raises(CodefendError, match="the objective was"):
        run(tmp_path / "new", replace(MORE, attacked=str(other)))


def test_reused_images_survive_a_kill(donor: Path, tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    class Mortal(toys.ToyVictim):
        def generate(self, images: Tensor, prompts: Any) -> list[str]:
            if self.calls == 8:
                raise Killed
            return super().generate(images, prompts)

    config = replace(MORE, attacked=str(donor))
    with pytest.raises(Killed):
        run(tmp_path / "cut", config, Mortal())
    assert bare(run(tmp_path / "cut", config)) == bare(run(tmp_path / "whole", config))
