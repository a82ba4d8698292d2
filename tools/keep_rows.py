"""Keep the rows of evaluations with several seeds as Parquet, and recompute their tables from it without a GPU.

Usage: python tools/keep_rows.py RUN [RUN ...] NAME     writes results/rows/NAME.parquet
       python tools/keep_rows.py --table NAME [REFERENCE]

RUN is a folder of `codefend eval headline` or of any other evaluation. Needs pyarrow and, for the tables, codefend.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from codefend.bench.report.seeds import read_seeds, tables
from codefend.core.runs import read_config, read_rows

FOLDER = Path(__file__).parent.parent / "results" / "rows"
COLUMNS = ("seed", "task", "defense", "threat", "attack", "eps", "norm", "example", "image", "kind", "victim", "answer")
NUMBERS = ("mean_scores", "worst_scores", "vote_scores")  # of the headline metric
JSON = ("answers", "success_any", "budget")  # as text


def rows_of(run: str | Path) -> list[dict[str, Any]]:
    """The rows of a run folder with their seed."""
    if read_config(run).get("seeds"):
        return read_seeds(run)
    seed = read_config(run)["seed"]
    return [{**row, "seed": seed} for row in read_rows(run)]


def kept(row: dict[str, Any]) -> dict[str, Any]:
    """The columns of one row from which every table can be recomputed."""
    columns = {name: row[name] for name in COLUMNS} | {"headline": row["headline"]}
    columns |= {name: row[name][row["headline"]] for name in NUMBERS}
    return columns | {name: json.dumps(row.get(name)) for name in JSON}


def read_kept(name: str) -> list[dict[str, Any]]:
    """The rows of results/rows/NAME.parquet as evaluations have them."""
    rows: list[dict[str, Any]] = pq.read_table(FOLDER / f"{name}.parquet").to_pylist()
    return [row | {column: {row["headline"]: row[column]} for column in NUMBERS} for row in rows]


def main(arguments: Sequence[str]) -> int:
    if len(arguments) < 2:
        print(__doc__, file=sys.stderr)
        return 2
    if arguments[0] == "--table":
        rows = read_kept(arguments[1])
        reference = arguments[2] if len(arguments) > 2 else "bridge"
        print("\n".join(line for table in tables(rows, reference) for line in table.markdown()))
        return 0
    *runs, name = arguments
    rows = [kept(row) for run in runs for row in rows_of(run)]
    FOLDER.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), FOLDER / f"{name}.parquet", compression="zstd")
    print(f"{FOLDER / name}.parquet: {len(rows)} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
