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


def texts(table: list[tuple[str, ...]] | tuple[tuple[str, ...], ...], column: int) -> list[str]:
    return [line[column] for line in table]


def made(example: int, score: float | None, **changes: object) -> Row:
    row: Row = {"task": "t", "defense": "d", "threat": "T0", "attack": "a", "eps": 0.1, "norm": "l2", "headline": "m"}
    row |= {"example": str(example), "image": str(example), "resubmissions": 1, "success": {}, "success_any": {}}
    row |= {key: {"m": score} for key in ("scores", "mean_scores", "worst_scores", "vote_scores")}
    return row | changes


def fell(example: int, untargeted: int | None, targeted: int | None = None, **changes: object) -> Row:
    found = {"untargeted": untargeted} | ({} if targeted is None else {"targeted": targeted})
    return made(example, 0.0, success_any=found, **changes)


def copied(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def rewrite(folder: Path, change: dict[str, object]) -> None:
    path = folder / "rows.jsonl"
    rows = [json.loads(line) | change for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


class Page(HTMLParser):
    """Collects tags, addresses and text; complains about tags that aren't closed."""

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
