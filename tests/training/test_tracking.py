"""Trackers of trainings: the rows they receive, run folders that do not depend on them, and errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
from accelerate import tracking

from codefend.cli import main
from codefend.core.runs import open_run
from codefend.training.tracking import tracked


class Memory(tracking.GeneralTracker):  # type: ignore[misc,name-defined]
    """A registered tracker that records its calls; fails at the step ``fails``."""

    name, requires_logging_directory, tracker = "memory", False, None
    calls: ClassVar[list[Any]] = []
    fails = -1

    def __init__(self, project: str) -> None:
        super().__init__()
        self.calls.append(("project", project))

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.calls.append(("config", values))

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        if step == self.fails:
            raise RuntimeError("no connection")
        self.calls.append((step, values))

    def finish(self) -> None:
        self.calls.append("finished")


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> type[Memory]:
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "memory", Memory)
    monkeypatch.setattr(Memory, "calls", [])
    return Memory


def work(folder: Path, steps: int) -> bytes:
    """The rows of a training that does steps 1 to ``steps``, some of them for the second time."""
    with open_run(folder, {"train": "toy", "pairs": ("a", "b"), "lr": 0.1}) as run:
        run.append({"key": "ground-0", "loss": 9.0})
        for step in range(1, steps + 1):
            run.append({"key": f"step-{step}", "step": step, "loss": 1 / step, "mined": True, "note": "text"})
    return (folder / "rows.jsonl").read_bytes()


def test_a_tracker_receives_new_steps_only(memory: type[Memory], tmp_path: Path) -> None:
    alone = work(tmp_path / "alone", 2)
    with tracked("memory"):
        assert work(tmp_path / "run", 2) == alone
    assert memory.calls == [
        ("project", "codefend"),
        ("config", {"train": "toy", "pairs": "['a', 'b']", "lr": 0.1}),
        (1, {"loss": 1.0, "mined": 1.0}),
        (2, {"loss": 0.5, "mined": 1.0}),
        "finished",
    ]
    assert (tmp_path / "run/config.json").read_bytes() == (tmp_path / "alone/config.json").read_bytes()
    with tracked("memory"):
        work(tmp_path / "run", 3)
    assert [step for step, _ in memory.calls[6:-1] if isinstance(step, int)] == [3]
    count = len(memory.calls)
    work(tmp_path / "run", 4)  # without a tracker the same run resumes
    assert len(memory.calls) == count


def test_a_training_continues_after_an_error_of_its_tracker(
    memory: type[Memory], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(memory, "fails", 2)
    with tracked("memory"):
        assert len(work(tmp_path, 4).splitlines()) == 5
    assert [call[0] for call in memory.calls[2:]] == [1]
    assert capsys.readouterr().err.count("no connection") == 1


@pytest.mark.parametrize("name", ["nothing", "wandb"])
def test_a_tracker_that_is_not_available_is_one_error(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "_available_trackers", [])
    assert main(["train", "prior", "--run", str(tmp_path / "run"), "--tracker", name]) == 2
    assert {"nothing": "known: aim", "wandb": "pip install wandb"}[name] in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_tensorboard_writes_into_the_run_folder(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="optional: one of the trackers")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with tracked("tensorboard"):
        work(tmp_path, 3)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("loss")] == pytest.approx([1, 1 / 2, 1 / 3])
    assert json.loads((tmp_path / "config.json").read_text())["lr"] == 0.1
