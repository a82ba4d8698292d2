"""One evaluation with several seeds: runs, means per example, corrected paired differences, and rows as Parquet."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import toys
from codefend.bench import SeedsConfig, evaluate
from codefend.bench.report import export_rows, write_report
from codefend.bench.report.seeds import read_seeds, tables
from codefend.bench.seeds import seed_means
from codefend.core.runs import Row
from codefend.types import CodefendError

CONFIG = SeedsConfig(
    victim="toy",
    tasks=("questions",),
    defenses=("none", "smooth", "jitter"),
    attacks=("pgd",),
    steps=4,
    limit=6,
    seeds=(0, 5),
    reference="smooth",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("seeds") / "run"
    rows = evaluate(CONFIG, run, loaders=toys.loaders())
    assert {row["seed"] for row in rows} == {0, 5}
    return run


def test_each_seed_has_a_run_of_its_own_and_an_example_the_mean_over_them(folder: Path) -> None:
    assert sorted(path.name for path in folder.glob("seed-*")) == ["seed-0", "seed-5"]
    rows = read_seeds(folder)
    means = {(f.group.defense, f.group.threat): f for f in seed_means(rows)}
    assert set(means) >= {("none", "clean"), ("none", "T0"), ("smooth", "T2"), ("jitter", "T2")}
    figure = means["jitter", "T2"]
    assert (figure.seeds, len(figure.scores)) == (2, 6)

    def worst(seed: int, example: str) -> float:
        """An attacker at T2 also has the images of T0."""
        mine: list[Row] = [
            row
            for row in rows
            if (row["seed"], row["defense"], row["example"]) == (seed, "jitter", example) and row["eps"]
        ]
        return min(float(row["worst_scores"]["vqa_accuracy"]) for row in mine)

    for example, mean in figure.scores.items():
        assert mean == pytest.approx((worst(0, example) + worst(5, example)) / 2)


def test_differences_are_paired_and_corrected_for_their_number(folder: Path) -> None:
    scores, differences = tables(read_seeds(folder), "smooth")
    assert len(scores.lines) == 3 + 3 + 2  # clean; T0; T2 without the undefended victim
    assert len(differences.lines) == 2 + 2 + 1
    assert "5 comparisons: each interval has confidence 99.00%" in differences.notes[0]
    attacked = next(line for line in differences.lines if line[1:4] == ("T0", "8/255", "none"))
    assert attacked[-1] == "below"
    same = seed_means(read_seeds(folder))[0]
    gap = same.less(same, confidence=0.99)
    assert (gap.mean, gap.low, gap.high) == (0, 0, 0)


def test_the_report_and_all_rows_are_written(folder: Path, tmp_path: Path) -> None:
    text = write_report(folder, tmp_path / "report.html").read_text()
    assert "Differences from smooth" in text
    assert "| jitter |" in text
    lines = export_rows(folder, tmp_path / "rows.csv").read_text().splitlines()
    assert len(lines) == 1 + len(read_seeds(folder))


@pytest.mark.parametrize("wrong", [{"seeds": ()}, {"seeds": (1, 1)}, {"reference": "bridge"}])
def test_seeds_and_the_reference_are_checked_early(wrong: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(CodefendError):
        SeedsConfig(defenses=("none",), **wrong)  # type: ignore[arg-type]


def test_the_headline_preset_is_such_an_evaluation(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    code, out, _ = run("eval", "headline", "--run", tmp_path / "run", "--dry-run")
    assert code == 0
    assert '"adaptive_limit": 64' in out
    assert '"limit": 128' in out
    assert '"seeds": [' in out
