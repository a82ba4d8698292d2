"""Shared fixtures, and the rule for skips: in CI a test may be skipped for a listed reason only."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from codefend.core.runs import Row, Run

# What CI does not install, and why: a word of the skip reason -> the reason. In CI any other skip fails the run.
OPTIONAL = {
    "bitsandbytes": "quantization for GPUs",
    "vllm": "gigabytes, for GPUs",
    "vLLM": "gigabytes, for GPUs",
    "litellm": "its pins conflict with this project's",
    "LiteLLM": "its pins conflict with this project's",
    "lmms-eval": "brings torchvision, which does not fit the pinned torch",
    "datasets": "only read in one test of a Parquet bank",
    "one of the trackers": "an experiment tracker of the user's choice",
    "oidn": "a baseline's library of 88 MB",
    "Chromium": "a browser",
    "GPU": "hardware",
    "torchattacks": "its metadata asks for torchvision, which does not fit the pinned torch",
}
_unexpected: list[str] = []


def _note_skip(report: pytest.CollectReport | pytest.TestReport) -> None:
    if report.skipped and isinstance(report.longrepr, tuple):
        reason = str(report.longrepr[2])
        if not any(word in reason for word in OPTIONAL):
            _unexpected.append(f"{report.nodeid}: {reason}")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _note_skip(report)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    _note_skip(report)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _unexpected and os.environ.get("CI"):
        print("\nskipped, and no listed reason (tests/conftest.py):", *_unexpected, sep="\n  ")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
os.environ["CODEFEND_PRECISION"] = "float32"  # the same numbers on any machine, and two ways to one of them agree


@pytest.fixture(scope="session")
def bare_pocket():  # type: ignore[no-untyped-def]
    """A pocket with pretrained parts and an untrained connector: loads in seconds, answers nonsense."""
    from codefend.types import CodefendError
    from codefend.victims.pocket import Pocket

    torch.manual_seed(0)
    try:
        return Pocket("lite0", rank=4)
    except CodefendError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def grid(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """The rows of one small evaluation, which no test may change."""
    import evaluate_kit

    return evaluate_kit.run(tmp_path_factory.mktemp("grid"))


@pytest.fixture(scope="session")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an evaluation to report on, which no test may change."""
    import toys
    from codefend.bench import evaluate
    from report_kit import CONFIG

    run = tmp_path_factory.mktemp("report") / "run"
    evaluate(CONFIG, run, loaders=toys.loaders())
    return run


@pytest.fixture(scope="module")
def few_samples() -> Iterator[None]:
    """Intervals from fifty resamplings: reports in a fraction of the time."""
    from codefend.bench import results

    before, results.SAMPLES = results.SAMPLES, 50
    yield
    results.SAMPLES = before


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command line and return its exit code, standard output and standard error."""
    from codefend import cli

    def call(*arguments: object) -> tuple[int, str, str]:
        code = cli.main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object], int], None]:
    """``interrupt(work, step)`` trains until Ctrl-C comes, when that step is computed but not yet logged."""
    from codefend.core import runs

    def call(work: Callable[[], object], step: int) -> None:
        append = runs.Run.append

        def stop(self: Run, row: dict[str, Any]) -> bool:
            if row["step"] == step:
                raise KeyboardInterrupt
            return append(self, row)

        with monkeypatch.context() as patch:
            patch.setattr(runs.Run, "append", stop)
            with pytest.raises(KeyboardInterrupt):
                work()

    return call


@pytest.fixture
def interrupt_saved(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object], int], None]:
    """``interrupt_saved(work, step)`` trains until Ctrl-C comes, as soon as that step's checkpoint is there."""
    from codefend.training import fit

    def call(work: Callable[[], object], step: int) -> None:
        save = fit.save_training

        def stop(path: Path, training: Any, number: int) -> None:
            save(path, training, number)
            if number == step:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(fit, "save_training", stop)
            with pytest.raises(KeyboardInterrupt):
                work()

    return call
