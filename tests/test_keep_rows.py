"""`tools/keep_rows.py`: the tables that it recomputes from Parquet are those of the rows."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

import toys
from codefend.bench import SeedsConfig, evaluate
from codefend.bench.certify import CertifyConfig, run_certify
from codefend.bench.report import certificates
from codefend.bench.report.seeds import read_seeds, tables

FILE = Path(__file__).parents[1] / "tools" / "keep_rows.py"


@pytest.fixture
def keep_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("keep_rows", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "FOLDER", tmp_path / "rows")
    return module


def test_rows_of_several_seeds(keep_rows: ModuleType, tmp_path: Path) -> None:
    attacks = {"attacks": ("pgd",), "steps": 2, "limit": 4, "seeds": (0, 5), "reference": "smooth"}
    config = SeedsConfig(victim="toy", tasks=("questions",), defenses=("none", "smooth"), **attacks)  # type: ignore[arg-type]
    evaluate(config, tmp_path / "run", loaders=toys.loaders())
    assert keep_rows.main([str(tmp_path / "run"), "toy"]) == 0
    assert tables(keep_rows.read_kept("toy"), "smooth") == tables(read_seeds(tmp_path / "run"), "smooth")


def test_certificates(keep_rows: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    defenses = ("noise:sigma=0.1", "noise:sigma=0.4")
    config = CertifyConfig("toy", ("questions", "captions"), defenses, samples=20, selection=5, limit=2)
    run_certify(config, tmp_path / "run", toys.loaders())
    assert keep_rows.main([str(tmp_path / "run"), "toy"]) == 0
    capsys.readouterr()
    assert keep_rows.main(["--table", "toy"]) == 0
    expected = [line for table in certificates.tables(tmp_path / "run") for line in table.markdown()]
    assert capsys.readouterr().out.splitlines() == expected


def test_rows_of_a_benchmark(keep_rows: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cell = {"task": "vqa", "defense": "bridge", "threat": "T2", "eps": 4}
    rows = [{"key": i, **cell, "id": str(i), "kind": "colour", "score": score} for i, score in enumerate((1.0, 0.5))]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert keep_rows.main([str(source), "toy"]) == 0
    assert keep_rows.main(["--table", "toy"]) == 0
    assert "vqa bridge T2 4 n=2" in capsys.readouterr().out
    assert [row["score"] for row in keep_rows.read_kept("toy")] == [1.0, 0.5]


def test_the_difference_of_two_defenses_is_paired(keep_rows: ModuleType) -> None:
    rows = [
        {"defense": defense, "task": "caption", "id": str(i), "eps": eps, "threat": "T2", "score": score}
        for i in range(8)
        for eps in (4, 8)
        for defense, score in (("a", i / 10 + 0.2), ("b", i / 10), ("c", 0.0))
    ]
    alone = {**rows[0], "id": "of a alone", "score": 1.0}
    clean = [{**rows[0], "threat": "clean", "score": 1.0}, {**rows[1], "threat": "clean", "score": 0.0}]
    found = keep_rows.difference([*rows, alone, *clean], "a", "b")
    assert found.n == 8
    assert [found.mean, found.low, found.high] == pytest.approx([0.2] * 3)
