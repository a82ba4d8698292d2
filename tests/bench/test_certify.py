"""Certificates of whole tasks: rows, resumption, the estimate, the report and the command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import toys
from codefend.bench.certify import CertifyConfig, run_certify
from codefend.bench.report import export_rows, write_report
from codefend.bench.smoothing import SmoothedVictim
from codefend.core.runs import read_rows
from codefend.types import CodefendError

CONFIG = CertifyConfig(
    victim="toy",
    tasks=("questions", "captions"),
    defenses=("noise:sigma=0.1", "noise:sigma=0.4"),
    samples=60,
    selection=10,
    limit=3,
    batch=20,
)
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("certify") / "run"
    run_certify(CONFIG, run, toys.loaders())
    return run


def test_every_example_gets_a_certificate_behind_every_defense(folder: Path) -> None:
    rows = read_rows(folder)
    assert len({row["key"] for row in rows}) == len(rows) == 2 * 2 * 3
    sure = [row for row in rows if row["sigma"] == 0.1]
    assert all(row["right"] and row["radius"] > 0 for row in sure)
    assert all(row["radius"] <= row["sigma"] * 1.3 for row in rows)  # what 60 draws can certify
    assert all(row["draws"] == 60 for row in rows)


def test_a_caption_is_certified_by_all_objects_of_its_task(folder: Path) -> None:
    rows = [row for row in read_rows(folder) if row["task"] == "captions" and row["sigma"] == 0.1]
    for row in rows:
        assert set(row["objects"]) == {"red", "green", "blue"}
        assert row["exact"]
        assert row["exact_radius"] == pytest.approx(min(radius for _, _, radius in row["objects"].values()), abs=1e-5)
        assert row["exact_radius"] <= row["radius"]


def test_a_rerun_draws_nothing_new_and_a_killed_run_resumes_with_the_same_rows(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draws = 0
    draw = SmoothedVictim.draw

    def counted(self: SmoothedVictim, *args: object, **kwargs: object) -> list[str]:
        nonlocal draws
        draws += 1
        if draws > 13:
            raise KeyboardInterrupt
        return draw(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(SmoothedVictim, "draw", counted)
    run_certify(CONFIG, folder, toys.loaders())
    assert draws == 0
    with pytest.raises(KeyboardInterrupt):
        run_certify(CONFIG, tmp_path / "run", toys.loaders())
    monkeypatch.undo()
    assert 0 < len(read_rows(tmp_path / "run")) < 12
    run_certify(CONFIG, tmp_path / "run", toys.loaders())

    def timeless(path: Path) -> list[dict[str, object]]:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in read_rows(path)]

    assert timeless(tmp_path / "run") == timeless(folder)


def test_the_cost_is_estimated_before_the_folder_is_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_certify(CONFIG, tmp_path / "run", toys.loaders(), estimate_only=True) == []
    assert not (tmp_path / "run").exists()
    text = capsys.readouterr().err
    assert "noise:sigma=0.4 captions: 3 examples x 70 answers" in text
    assert "rerun the command to resume" in text


def test_the_report_shows_certified_accuracy_against_radius(folder: Path, tmp_path: Path, run: Run) -> None:
    path = write_report(folder, tmp_path / "report.html")
    text = path.with_suffix(".md").read_text()
    line = next(line for line in text.splitlines() if line.startswith("| noise:sigma=0.1"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1:6] == ["0.1", "3", "60", "1.00", "0.00"]
    assert cells[6].startswith("1.00")
    assert cells[8].startswith("0.00")  # r = .25 is beyond what 60 draws at this noise certify
    assert "every object is named, and no other" in text
    assert "data:image/svg+xml" in path.read_text()
    code, out, _ = run("report", folder, "--out", tmp_path / "again.html", "--rows", tmp_path / "rows.csv")
    assert (code, "every object is named" in out) == (0, True)
    assert export_rows(folder, tmp_path / "rows.csv").read_text().count("\n") == 13


def test_another_config_or_a_defense_without_noise_is_refused_before_a_folder_is_made(tmp_path: Path, run: Run) -> None:
    with pytest.raises(CodefendError, match="noise"):
        run_certify(CertifyConfig(defenses=("smooth",)), tmp_path / "run", toys.loaders())
    assert not (tmp_path / "run").exists()
    code, _, err = run("certify", "--run", tmp_path / "run", "--set", "samples=5")
    assert code == 2
    assert "certify nothing" in err
    few = CertifyConfig(victim="toy", tasks=("captions",), defenses=("noise:sigma=0.1",), samples=11)  # for questions
    with pytest.raises(CodefendError, match="certify nothing"):
        run_certify(few, tmp_path / "run", toys.loaders())
    assert run("certify", "--run", tmp_path / "run", "--dry-run")[0] == 0
    assert not (tmp_path / "run").exists()
