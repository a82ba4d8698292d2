"""The training loop: schedule, groups, average, clipping, checkpoints and resumption, rows, and early failure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from codefend.core.runs import read_rows
from codefend.training.fit import (
    Log,
    Losses,
    MovingAverage,
    Training,
    cosine_rate,
    cosine_schedule,
    fit,
    held_rate,
    optimize,
    restore_training,
)
from codefend.types import CodefendError

Interrupt = Callable[[Callable[[], object], int], None]
CONFIG = {"train": "line"}


def line(**changes: Any) -> Training[Tensor]:
    """Two numbers, each with a learning rate, that are fitted to noisy points of a line."""
    slope, offset = nn.Parameter(torch.tensor([2.0])), nn.Parameter(torch.tensor([-1.0]))
    optimizer = torch.optim.AdamW([{"params": [slope], "lr": 0.1}, {"params": [offset], "lr": 0.01}])

    def loss(points: Tensor, number: int) -> Losses:
        error = slope * points[0] + offset - points[1]
        return {"fit": error.square().mean(), "ridge": 0.01 * slope.square().sum(), "odd": number % 2 == 1, "n": 8.0}

    values: dict[str, Any] = {
        "parameters": {"slope": slope, "offset": offset},
        "batch": points,
        "loss": loss,
        "optimizer": optimizer,
        "schedule": cosine_schedule(optimizer, 6, warmup=2),
        "average": MovingAverage(nn.ParameterList([slope, offset])),
        "steps": 6,
        "save_every": 2,
    }
    return Training(**{**values, **changes})


def points(number: int) -> Tensor:
    x = torch.rand(8, generator=torch.Generator().manual_seed(number))
    return torch.stack([x, 0.5 * x + 0.25])


def train_line(folder: Path, **changes: Any) -> tuple[list[float], list[dict[str, Any]]]:
    """Parameters and averages after a training in ``folder``, and the rows without times."""
    training = line(**changes)
    fit(folder, CONFIG, lambda: training)
    assert training.average is not None
    values = [*training.parameters.values(), *training.average.module]
    rows = [{key: value for key, value in row.items() if key != "seconds"} for row in read_rows(folder)]
    return [value.item() for value in values], rows


def test_rows_hold_the_terms_their_sum_and_the_plain_numbers(tmp_path: Path) -> None:
    _, rows = train_line(tmp_path)
    assert [row["key"] for row in rows] == [f"step-{step}" for step in range(1, 7)]
    assert [row["odd"] for row in rows] == [False, True] * 3
    assert all(row["loss"] == pytest.approx(row["fit"] + row["ridge"]) for row in rows)
    assert [row["rate"] for row in rows] == pytest.approx([cosine_rate(step, 6, warmup=2) for step in range(6)])
    assert rows[-1]["n"] == 8.0
    assert rows[-1]["fit"] < rows[0]["fit"]


@pytest.mark.parametrize("step", [1, 3, 6])
def test_an_interrupted_training_equals_an_uninterrupted_one(step: int, tmp_path: Path, interrupt: Interrupt) -> None:
    whole = train_line(tmp_path / "whole")
    interrupt(lambda: train_line(tmp_path / "cut"), step)
    assert train_line(tmp_path / "cut") == whole
    assert train_line(tmp_path / "cut") == whole  # nothing is left to do


def test_any_schedule_of_the_step_number_resumes(tmp_path: Path, interrupt: Interrupt) -> None:
    def one_cycle() -> dict[str, Any]:
        training = line()
        schedule = torch.optim.lr_scheduler.OneCycleLR(training.optimizer, [0.1, 0.01], total_steps=6)
        return {**vars(training), "schedule": schedule}

    whole = train_line(tmp_path / "whole", **one_cycle())
    interrupt(lambda: train_line(tmp_path / "cut", **one_cycle()), 4)
    assert train_line(tmp_path / "cut", **one_cycle()) == whole


def test_micro_batches_are_averaged(tmp_path: Path) -> None:
    def pair(number: int) -> Tensor:
        return torch.cat([points(2 * number), points(2 * number + 1)], 1)

    (both, _), (micro, rows) = (
        train_line(tmp_path / "both", batch=pair),
        train_line(tmp_path / "micro", micro=2),
    )
    assert micro == pytest.approx(both, abs=1e-5)
    assert all(row["odd"] for row in rows)


def test_every_group_keeps_its_learning_rate() -> None:
    training = line()
    steps = optimize(training)
    next(steps)
    assert [group["lr"] for group in training.optimizer.param_groups] == pytest.approx([0.1, 0.01])  # of the 2nd step
    assert abs(training.parameters["slope"].item() - 2) > 5 * abs(training.parameters["offset"].item() + 1)


def test_the_average_has_a_short_memory_at_first() -> None:
    weight = nn.Parameter(torch.zeros(1))
    average = MovingAverage(nn.ParameterList([weight]))
    expected = 0.0
    for update in range(1, 40):
        with torch.no_grad():
            weight.fill_(float(update))
        average.update()
        decay = min(0.998, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * update
        assert average.module[0].item() == pytest.approx(expected, rel=1e-5)


def test_the_gradient_is_clipped_by_default() -> None:
    slope = nn.Parameter(torch.ones(1))
    for clip, change in ((1.0, 1.0), (None, 100.0)):
        optimizer = torch.optim.SGD([slope], lr=1.0)
        training = line(
            parameters={"slope": slope},
            loss=lambda batch, number: {"steep": 100 * slope.sum()},
            optimizer=optimizer,
            schedule=torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0),
            average=None,
            clip=clip,
        )
        before = slope.item()
        (_, row) = next(optimize(training))
        assert row["grad_norm"] == pytest.approx(100)
        assert before - slope.item() == pytest.approx(change, rel=1e-4)


def test_weights_are_saved_at_intervals_and_at_the_end(tmp_path: Path) -> None:
    saved: list[int] = []
    train_line(tmp_path, save=saved.append, save_every=4)
    assert saved == [4, 6]


def test_a_stage_before_the_first_step_runs_once(tmp_path: Path, interrupt: Interrupt) -> None:
    stages: list[str] = []

    def train(folder: Path) -> tuple[list[float], list[dict[str, Any]]]:
        training = line()

        def prepare(log: Log) -> None:
            stages.append(folder.name)
            training.parameters["slope"].data.fill_(1.0)
            log({"key": "warm-0", "step": 0})

        return train_line(folder, **{**vars(training), "prepare": prepare})

    whole = train(tmp_path / "whole")
    interrupt(lambda: train(tmp_path / "cut"), 1)  # before the first checkpoint of the loop
    assert train(tmp_path / "cut") == whole
    assert stages == ["whole", "cut"]


def test_a_checkpoint_has_the_names_that_older_runs_have(tmp_path: Path) -> None:
    from codefend.core.checkpoints import load_checkpoint

    train_line(tmp_path)
    tensors, state = load_checkpoint(tmp_path / "checkpoint.safetensors")
    kinds = ("net", "average", "exp_avg", "exp_avg_sq", "step")
    assert set(tensors) == {f"{kind}/{name}" for kind in kinds for name in ("slope", "offset")}
    assert state == {"step": 6, "updates": 6}
    assert restore_training(tmp_path / "checkpoint.safetensors", line()) == 6


def test_a_loss_that_is_not_finite_ends_the_training(tmp_path: Path) -> None:
    training = line()
    slope = training.parameters["slope"]
    with pytest.raises(CodefendError, match="not finite at step 1; use a lower learning rate"):
        fit(tmp_path, CONFIG, lambda: line(loss=lambda batch, number: {"bad": slope.sum() * float("nan")}))
    assert read_rows(tmp_path) == []


def test_a_gradient_that_is_not_finite_ends_the_training_before_a_weight_changes(tmp_path: Path) -> None:
    training = line()
    slope = training.parameters["slope"]
    before = slope.detach().clone()
    steep = {"loss": (slope * 0).abs().sum().sqrt() + slope.sum()}  # finite, its gradient is not
    with pytest.raises(CodefendError, match="gradient is not finite at step 1"):
        fit(tmp_path, CONFIG, lambda: replace(training, loss=lambda batch, number: steep))
    assert torch.equal(slope, before)
    assert not (tmp_path / "checkpoint.safetensors").exists()


def test_a_mistake_leaves_no_folder(tmp_path: Path) -> None:
    def build() -> Training[Tensor]:
        raise CodefendError("no such model")

    for name in ("steps", "batch", "lr", "save_every"):
        with pytest.raises(CodefendError, match=f"{name} must be above 0, not -1"):
            fit(tmp_path / "run", {"train": "line", name: -1}, build)
    with pytest.raises(CodefendError, match="no such model"):
        fit(tmp_path / "run", CONFIG, build)
    with pytest.raises(CodefendError, match="micro=0 batches"):
        fit(tmp_path / "run", CONFIG, lambda: line(micro=0))
    assert not (tmp_path / "run").exists()


def test_another_config_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    train_line(tmp_path)
    with pytest.raises(CodefendError, match="train was 'line', now 'curve'"):
        fit(tmp_path, {"train": "curve"}, lambda: pytest.fail("built"))


def test_a_held_rate_is_constant_until_its_decay_and_then_falls_to_zero() -> None:
    rates = [held_rate(step, 100, warmup=10, decay=0.2) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert set(rates[10:80]) == {1.0}
    assert rates[90] == pytest.approx(0.5)
    assert rates[100] == 0
