"""Rows of small evaluations, and a half-finished run folder of the code of 2026-11-29 for later code to resume."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from goldens import kit

OLD_RUN = kit.DATA / "old_run"
SETTINGS = (
    "tasks=caption,vqa",
    "defenses=none,jpeg,bridge",
    "attacks=apgd",
    "threats=T0,T2",
    "steps=2",
    "eot=1",
    "limit=2",
    "batch=2",
    "panels=0",
    "adaptive=jpeg,bridge",
)
FILES = ("config.json", "bench.json", "rows.jsonl")  # of a run, under 200 KB; attacked images are computed again
DROPPED = ("caption | jpeg | T2 |", "vqa | none | T0 |", "vqa | bridge | T2 |")  # beginnings of keys: computed again
TIMES = {"seconds", "purify_seconds", "generate_seconds", "ms_per_image"}

# Every attack once, two steps long, on one image: their numbers must not change when their files move.
EVERY_ATTACK = (
    *("pgd", "apgd:restarts=2", "apgd-targeted", "apgd-margin", "feature", "cw", "mifgsm", "dim"),
    *("ssa-cwa", "pureproof", "square", "universal", "patch", "stadv", "perc-al", "corruption", "noise"),
    *("characters", "glyphs", "words", "planted", "injection", "typographic", "joint", "joint-targeted"),
)
ADAPTIVE = ("apgd:bpda=true", "apgd:process=1", "apgd:evade=10")


def tolerance() -> dict[str, Any]:
    """How close the rows must be. On another processor the sign of a tiny gradient may turn, and pixels with it.

    So the objective of a short attack moves by .35 from AVX2 to AVX512, and a gradient norm in training by 3%.
    """
    exact = kit.load("purified")["machine"] == kit.machine()
    return {"grow": True} if exact else {"grow": True, "relative": 0.25, "absolute": 0.5}


def untimed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: untimed(item) for key, item in value.items() if key not in TIMES}
    return [untimed(item) for item in value] if isinstance(value, list) else value


def rows_of(folder: Path) -> dict[str, Any]:
    lines = (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["key"]: untimed(row) for row in map(json.loads, lines)}


def evaluated(run: Path, settings: Iterable[str]) -> dict[str, Any]:
    """``codefend eval`` in ``run``: its rows by key."""
    with kit.deterministic():
        kit.run_well("eval", "--run", run, *(word for s in settings for word in ("--set", s)))
    return rows_of(run)


def whole(place: Path) -> dict[str, Any]:
    """The small evaluation from nothing."""
    return evaluated(place / "run", SETTINGS)


def resumed(place: Path) -> dict[str, Any]:
    """The old run, resumed by the current code."""
    shutil.copytree(OLD_RUN, place / "run")
    before = rows_of(place / "run")
    rows = evaluated(place / "run", SETTINGS)
    assert len(before) < len(rows)
    assert {key: rows[key] for key in before} == before
    return rows


def golden() -> dict[str, Any]:
    """All rows of the small evaluation: those of the old run, and its missing ones."""
    missing: dict[str, Any] = kit.load("evaluation")
    return rows_of(OLD_RUN) | missing


def keep_old_run(run: Path) -> None:
    """Store the run folder without some of its rows, and these rows separately."""
    shutil.rmtree(OLD_RUN, ignore_errors=True)
    OLD_RUN.mkdir()
    for name in FILES:
        shutil.copy(run / name, OLD_RUN / name)
    lines = (run / "rows.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    remaining = [line for line in lines if not json.loads(line)["key"].startswith(DROPPED)]
    assert len(remaining) < len(lines)
    (OLD_RUN / "rows.jsonl").write_text("".join(remaining), encoding="utf-8")
    kit.save("evaluation", {key: row for key, row in rows_of(run).items() if key.startswith(DROPPED)})


def attacks(place: Path) -> dict[str, Any]:
    """Every attack at T0, and the adaptive options at T2 through a deterministic and a noisy defense."""
    one = ("tasks=vqa", "steps=2", "limit=1", "batch=1", "panels=0", "adaptive=")
    every = evaluated(place / "all", [*one, "defenses=none", "threats=T0", f"attacks={','.join(EVERY_ATTACK)}"])
    two = ("limit=2", "batch=2", "defenses=none", "threats=T0", "attacks=feature-target")  # it needs another image
    every |= evaluated(place / "two", [*one, *two])
    adaptive = evaluated(
        place / "adaptive",
        [
            *one,
            "defenses=none,bridge:evaluations=2,bridge-detail",
            "threats=T2,T2d",
            "eot=2",
            "resubmissions=2",
            f"attacks={','.join(ADAPTIVE)}",
        ],
    )
    names = ("answer", "objective", "perturbation", "violation", "success", "scores", "goal", "gradient_kind", "asked")
    return {key: {name: row[name] for name in names if name in row} for key, row in sorted((every | adaptive).items())}


def report(place: Path) -> dict[str, Any]:
    """The files of ``codefend report`` on a finished run, and the columns of its export."""
    shutil.copytree(OLD_RUN, place / "run")
    outcome = kit.run_well("report", place / "run", "--rows", place / "rows.csv")
    header = (place / "rows.csv").read_text(encoding="utf-8").partition("\n")[0]
    page = (place / "run").glob("*.html")
    return {
        "files": sorted(p.name for p in (place / "run").iterdir() if p.is_file() and not p.name.startswith(".")),
        "pages": sorted(p.name for p in page),
        "lines": len(outcome.out.splitlines()) > 5,
        "columns": sorted(header.split(",")),
    }
