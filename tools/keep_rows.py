"""Keep the rows of measurements as Parquet, and recompute their tables from it without a GPU or a victim.

Usage: python tools/keep_rows.py SOURCE [SOURCE ...] NAME     writes results/rows/NAME.parquet
       python tools/keep_rows.py --table NAME [REFERENCE]
       python tools/keep_rows.py --difference NAME FIRST SECOND

SOURCE is the run folder of an evaluation or of `codefend certify`, or the rows (.jsonl) of a script in benchmarks.
REFERENCE: the defense that others are compared with, of an evaluation with several seeds. FIRST, SECOND: two defenses
of a benchmark, of which the mean adaptive scores are subtracted, paired. Needs pyarrow and codefend.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from codefend.bench.report import certificates
from codefend.bench.report.seeds import read_seeds, tables
from codefend.core.runs import read_config, read_rows
from codefend.tasks.intervals import Interval, bootstrap_interval

FOLDER = Path(__file__).parent.parent / "results" / "rows"
COLUMNS = ("seed", "task", "defense", "threat", "attack", "eps", "norm", "example", "image", "kind", "victim", "answer")
NUMBERS = ("mean_scores", "worst_scores", "vote_scores")  # of the headline metric
JSON = ("answers", "success_any", "budget")  # as text
CELL = ("task", "encoder", "defense", "threat", "eps")  # of a benchmark's rows, those that they have


def rows_of(source: str) -> list[dict[str, Any]]:
    """The rows of a run folder, with its seed or its alpha, or those of a benchmark's file."""
    if not Path(source).is_dir():
        return [json.loads(line) for line in Path(source).read_text(encoding="utf-8").splitlines()]
    config = read_config(source)
    if config.get("seeds"):
        return read_seeds(source)
    added = {name: config[name] for name in ("seed", "alpha") if name in config}
    return [{**row, **added} for row in read_rows(source)]


def kept(row: dict[str, Any]) -> dict[str, Any]:
    """The columns of one row from which every table can be recomputed."""
    if "headline" not in row:
        return {k: json.dumps(v) if isinstance(v, list | dict) else v for k, v in row.items() if k != "seconds"}
    columns = {name: row[name] for name in COLUMNS} | {"headline": row["headline"]}
    columns |= {name: row[name][row["headline"]] for name in NUMBERS}
    return columns | {name: json.dumps(row.get(name)) for name in JSON}


def read_kept(name: str) -> list[dict[str, Any]]:
    """The rows of results/rows/NAME.parquet as evaluations, certificates and benchmarks have them."""
    rows: list[dict[str, Any]] = pq.read_table(FOLDER / f"{name}.parquet").to_pylist()
    if "headline" not in rows[0]:
        return [{k: json.loads(v) if k == "objects" else v for k, v in row.items() if v is not None} for row in rows]
    return [row | {column: {row["headline"]: row[column]} for column in NUMBERS} for row in rows]


def table(rows: Sequence[Mapping[str, Any]], reference: str) -> list[str]:
    """The lines of the tables of these rows, as a report has them; of a benchmark n and means of its cells."""
    if "headline" in rows[0]:
        parts = tables(rows, reference)
    elif "alpha" in rows[0]:
        parts = certificates.tables_of(certificates.curves_of([dict(row) for row in rows]), rows[0]["alpha"])
    else:
        return means(rows)
    return [line for part in parts for line in part.markdown()]


def means(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each cell of a benchmark: n, and the mean of each column of numbers."""
    cells = defaultdict(list)
    for row in rows:
        cells[tuple(str(row[name]) for name in CELL if name in row)].append(row)
    lines = []
    for cell, group in cells.items():
        names = [k for k, v in group[0].items() if k not in CELL and isinstance(v, bool | int | float)]
        values = (f"{name} {fmean(row[name] for row in group):.3f}" for name in names)
        lines.append(" ".join((*cell, f"n={len(group)}", *values)))
    return lines


def difference(rows: Sequence[Mapping[str, Any]], first: str, second: str) -> Interval:
    """Mean of first - second over the adaptive attacks (T2) of both, each example at all its radii as one."""
    scores = {
        (row["defense"], row["task"], row["id"], row["eps"]): row["score"] for row in rows if row["threat"] == "T2"
    }
    gaps = defaultdict(list)
    for (defense, *cell), score in scores.items():
        if defense == first and (second, *cell) in scores:
            gaps[tuple(cell[:2])].append(score - scores[second, *cell])
    return bootstrap_interval(torch.tensor([fmean(values) for values in gaps.values()]), samples=10_000)


def main(arguments: Sequence[str]) -> int:
    if len(arguments) < 2:
        print(__doc__, file=sys.stderr)
        return 2
    if arguments[0] == "--table":
        reference = arguments[2] if len(arguments) > 2 else "bridge"
        print("\n".join(table(read_kept(arguments[1]), reference)))
        return 0
    if arguments[0] == "--difference" and len(arguments) == 4:
        found = difference(read_kept(arguments[1]), *arguments[2:])
        print(f"{found.mean:.4f} [{found.low:.4f}, {found.high:.4f}] n={found.n}")
        return 0
    *sources, name = arguments
    rows = [kept(row) for source in sources for row in rows_of(source)]
    names = dict.fromkeys(column for row in rows for column in row)  # questions and captions have different ones
    columns = {column: [row.get(column) for row in rows] for column in names}
    FOLDER.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), FOLDER / f"{name}.parquet", compression="zstd")
    print(f"{FOLDER / name}.parquet: {len(rows)} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
