"""Rows as an evaluation writes them, and copies of a run."""

from __future__ import annotations

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

from codefend.bench import EvalConfig
from codefend.core.runs import Row

CONFIG = EvalConfig(
    victim="toy",
    tasks=("questions", "captions"),
    defenses=("none", "smooth", "leaky", "jitter"),
    attacks=("apgd", "apgd-targeted"),
    eps=(2.0, 8.0),
    steps=12,
    batch=12,
    limit=6,
    resubmissions=2,
    adaptive=("leaky", "smooth"),
    panels=1,
)


def column(table: list[tuple[str, ...]] | tuple[tuple[str, ...], ...], number: int) -> list[str]:
    return [line[number] for line in table]


def row_of(example: int, score: float | None, **changes: object) -> Row:
    row: Row = {"task": "t", "defense": "d", "threat": "T0", "attack": "a", "eps": 0.1, "norm": "l2", "headline": "m"}
    row |= {"example": str(example), "image": str(example), "resubmissions": 1, "success": {}, "success_any": {}}
    row |= {key: {"m": score} for key in ("scores", "mean_scores", "worst_scores", "vote_scores")}
    return row | changes


def row_with(example: int, untargeted: int | None, targeted: int | None = None, **changes: object) -> Row:
    success = {"untargeted": untargeted} | ({} if targeted is None else {"targeted": targeted})
    return row_of(example, 0.0, success_any=success, **changes)


def copy_run(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def rewrite_rows(folder: Path, change: dict[str, object]) -> None:
    path = folder / "rows.jsonl"
    rows = [json.loads(line) | change for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


class Page(HTMLParser):
    """Collects tags, addresses and text; asserts that they are closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
