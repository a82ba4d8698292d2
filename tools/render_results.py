"""Write the published figures of results/*.json into README.md, docs and model cards.

Usage: python tools/render_results.py [--check]

Two markers: a block ``<!-- results: NAME -->`` ... ``<!-- /results -->`` holds results/tables/NAME.md, rendered (NAME
"rows FILE": all figures of a file; "strongest": the strongest attack known against each defense; "answers": captions
and questions under the adaptive attack in two stages), and ``<!--=ID-->.90<!--/-->`` holds one figure. In a template,
``{ID}`` is a figure and ``{PREFIX/*}`` those of captions and questions; ``{?ID}`` is a dash where there is no such
figure, and a row of dashes is left out; ``{adaptive DEFENSE/EPS}`` is captions / questions under that attack, and n.
``|%`` and ``|%1`` print percent with no or one decimal, ``|2`` a number with two decimals, ``|e`` with an exponent,
``|dB`` with its unit, ``|n`` the number of examples, ``|ci`` the 95% interval, as published or Wilson's. Ids that begin
with "former-" are of weights that no longer ship.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from decimal import Decimal
from math import sqrt
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "docs/**/*.md", "src/codefend/weights/*/README.md", "packages/*/src/**/README.md")
BLOCK = re.compile(r"(<!-- results: (.+?) -->\n).*?(<!-- /results -->)", re.DOTALL)
INLINE = re.compile(r"(<!--=(.+?)-->).*?(<!--/-->)")
FIGURE = re.compile(r"\{([^{}\n]+/[^{}\n]+)\}")
ATTACKED = re.compile(r"(?P<defense>.+)/(?P<threat>T2d?)/(?P<attack>[^/]+)/(?P<eps>\d+)/(?P<task>caption|vqa)")
TWO_STAGE = "words-then-loss"  # the strongest adaptive attack that is run on captions and questions alike
FORMER = "former-"  # weights that no longer ship
TASKS = {"caption": "captions", "vqa": "questions"}
EMPTY_ROW = re.compile(r"\|[^|]*(\| - )+\|")
NOT_RECORDED = "The command was not recorded."


@dataclass(frozen=True)
class Figure:
    """One published number; ``interval`` is the 95% interval that was published with it."""

    id: str
    value: float
    unit: str
    n: int
    date: str
    command: str | None
    source: str | None
    interval: list[float] | None = None
    attack: str = ""
    weights: str = ""
    note: str = ""
    seed: int | None = None
    commit: str | None = None
    crops_of: int = 0  # photographs from which the examples were cut; so few have no interval


def load_figures(folder: Path = ROOT / "results") -> dict[str, Figure]:
    """All rows of ``folder/*.json`` by id. Raises ValueError for an id that occurs twice."""
    figures: dict[str, Figure] = {}
    for path in sorted(folder.glob("*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        for run in document["runs"]:
            common = {key: value for key, value in run.items() if key != "rows"}
            common["crops_of"] = document.get("crops_of", 0)
            for row in run["rows"]:
                figure = Figure(**{**common, **row})
                if figure.id in figures:
                    raise ValueError(f"{path.name}: {figure.id} occurs twice")
                figures[figure.id] = figure
    return figures


def render(text: str, figures: dict[str, Figure], folder: Path = ROOT / "results") -> str:
    """``text`` with every marker filled in. Raises ValueError for an unknown id or block."""

    def block(match: re.Match[str]) -> str:  # blank lines: a table is not part of the comment
        return f"{match[1]}\n{render_block(match[2], figures, folder).strip()}\n\n{match[3]}"

    def inline(match: re.Match[str]) -> str:
        return match[1] + look_up(match[2], figures) + match[3]

    return INLINE.sub(inline, BLOCK.sub(block, text))


def render_block(name: str, figures: dict[str, Figure], folder: Path) -> str:
    if name == "strongest":
        return strongest(figures)
    if name.startswith("rows "):
        return list_rows(folder / f"{name.removeprefix('rows ')}.json", figures)
    if name == "answers":
        return two_stage_table(figures)
    path = folder / "tables" / f"{name}.md"
    if not path.is_file():
        raise ValueError(f"there is no template {path.name} in results/tables")
    text = FIGURE.sub(lambda match: look_up(match[1], figures), path.read_text(encoding="utf-8"))
    return "\n".join(line for line in text.splitlines() if not EMPTY_ROW.fullmatch(line))


def strongest(figures: dict[str, Figure]) -> str:
    """The strongest attack known against each defense: the lowest figure of each threat model, radius and task."""
    lowest: dict[tuple[str, str, int, str], Figure] = {}
    for figure in figures.values():
        match = ATTACKED.fullmatch(figure.id)
        if match and not figure.id.startswith(FORMER):
            key = (match["defense"], match["threat"], int(match["eps"]), match["task"])
            lowest[key] = min(lowest.get(key, figure), figure, key=lambda f: f.value)
    lines = ["| defense | threat | eps | task | accuracy | n | 95% interval | strongest attack |", "|---" * 8 + "|"]
    for (defense, threat, eps, task), figure in sorted(lowest.items()):
        bounds = interval(figure)
        shown = f"{strip_zero(f'{bounds[0]:.2f}')} to {strip_zero(f'{bounds[1]:.2f}')}" if bounds else "-"
        attack = ATTACKED.fullmatch(figure.id)["attack"]  # type: ignore[index]
        lines.append(
            f"| `{defense}` | {threat} | {eps}/255 | {task} | {show(figure)} | {figure.n} | {shown} | {attack} |"
        )
    return "\n".join(lines)


def lowest_figure(figures: dict[str, Figure], defense: str, eps: str, task: str) -> Figure | None:
    """The lowest figure of all adaptive attacks, whichever images each was run on."""
    known = re.compile(rf"{re.escape(defense)}/T2/[^/]+/{eps}/{task}")
    found = [figure for id, figure in figures.items() if known.fullmatch(id)]
    return min(found, key=lambda figure: (figure.value, TWO_STAGE not in figure.id), default=None)


def adaptive_cell(figures: dict[str, Figure], defense: str, eps: str) -> str:
    """Captions / questions in percent, and n. "at most": by a weaker attack, since the stronger one was not run."""
    cells = {task: lowest_figure(figures, defense, eps, task) for task in TASKS}
    known = [figure for figure in cells.values() if figure]
    if not known:
        return "-"
    counts = ", ".join(dict.fromkeys(str(figure.n) for figure in known))
    weaker = any(
        figure.value and f"{defense}/T2/{TWO_STAGE}/{eps}/{task}" not in figures
        for task, figure in cells.items()
        if figure
    )
    values = " / ".join(show(figure, "%") if figure else "-" for figure in cells.values())
    return f"{'at most ' if weaker else ''}{values} (n {counts})"


def two_stage_table(figures: dict[str, Figure]) -> str:
    """Every defense under the adaptive attack in two stages: captions and questions by radius, with intervals."""
    pattern = re.compile(rf"(.+)/T2/{TWO_STAGE}/(\d+)/(?:caption|vqa)")
    matches = [match for id in figures if (match := pattern.fullmatch(id))]
    matches = [match for match in matches if not match[1].startswith(FORMER)]
    radii = sorted({match[2] for match in matches}, key=int)
    titles = ["defense", "task", "n", "clean", *(f"adaptive, {eps}/255" for eps in radii)]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for defense in dict.fromkeys(match[1] for match in matches):
        for task, title in TASKS.items():
            ids = [f"{defense}/clean-strata/{task}", *(f"{defense}/T2/{TWO_STAGE}/{eps}/{task}" for eps in radii)]
            counts = dict.fromkeys(str(figures[id].n) for id in ids if id in figures)
            cells = [f"`{defense}`", title, ", ".join(counts), *(look_up(f"?{id}|ci", figures) for id in ids)]
            lines += [f"| {' | '.join(cells)} |"] if counts else []
    return "\n".join(lines)


def look_up(text: str, figures: dict[str, Figure]) -> str:
    name, _, style = text.partition("|")
    if name.startswith("adaptive "):
        return adaptive_cell(figures, *name.removeprefix("adaptive ").rsplit("/", 1))
    optional, name = name.startswith("?"), name.removeprefix("?")
    names = [name.replace("*", task) for task in TASKS] if name.endswith("/*") else [name]
    unknown = [name for name in names if name not in figures]
    if unknown == names and optional:
        return "-"
    if unknown and optional:
        return " / ".join(show(figures[name], style) if name in figures else "-" for name in names)
    if unknown:
        raise ValueError(f"results/*.json has no figure {unknown[0]}")
    return " / ".join(show(figures[name], style) for name in names)


def show(figure: Figure, style: str = "") -> str:
    """A figure as text: shares without the zero before the point, dB and seconds with one decimal."""
    if style == "n":
        return str(figure.n)
    if style == "ci" and (bounds := interval(figure)):
        low, high = (strip_zero(f"{bound:.2f}") for bound in bounds)
        return f"{show(figure)} [{low}, {high}]"
    if style.startswith("%"):
        return f"{100 * Decimal(str(figure.value)):.{style[1:] or 0}f}%"  # decimal: as .39 and 39%, never .39 and 38%
    if style.isdigit():
        return strip_zero(f"{figure.value:.{style}f}")
    if style == "dB":
        return f"{figure.value:.1f} dB"
    if style == "e":
        return f"{figure.value:.1e}".replace("e-0", "e-") if figure.value else "0"
    if figure.unit == "dB":
        return f"{figure.value:.1f}"
    if figure.unit == "ms":
        return f"{figure.value:.0f}"
    if figure.unit == "s":
        return strip_zero(f"{figure.value:.1f}" if figure.value >= 1 else f"{figure.value:.2f}")
    return strip_zero(f"{Decimal(str(figure.value)):.2f}")


def strip_zero(number: str) -> str:
    return re.sub(r"^(-?)0\.", r"\1.", number)


def interval(figure: Figure) -> tuple[float, float] | None:
    """The published 95% interval; for other shares Wilson's, from value and n (draws of the noise count once)."""
    if figure.interval:
        return figure.interval[0], figure.interval[1]
    if figure.unit != "share" or figure.crops_of:
        return None
    z, n, p = 1.96, figure.n, figure.value
    centre, spread = p + z * z / (2 * n), z * sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2)
    low, high = (centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)
    return min(max(low, 0.0), p), max(min(high, 1.0), p)


def list_rows(path: Path, figures: dict[str, Figure]) -> str:
    return list_runs(json.loads(path.read_text(encoding="utf-8")), figures)


def list_runs(document: dict[str, Any], figures: dict[str, Figure]) -> str:
    parts = [document["about"]]
    for run in document["runs"]:
        facts = [run[key] for key in ("attack", "weights", "note") if run.get(key)]
        facts += [f"{key} {run[key]}" for key in ("seed", "commit") if key in run]
        command = f"`{run['command']}`" if run["command"] else f"**{NOT_RECORDED}**"
        parts.append(f"{run['date']}. {command}" + "".join(f" {fact[0].upper()}{fact[1:]}." for fact in facts))
        lines = ["| figure | value | n | 95% interval |", "|---|---|---|---|"]
        for row in run["rows"]:
            figure = figures[row["id"]]
            bounds = interval(figure)
            shown = f"{strip_zero(f'{bounds[0]:.2f}')} to {strip_zero(f'{bounds[1]:.2f}')}" if bounds else "-"
            lines.append(f"| `{figure.id}` | {show(figure)} | {figure.n} | {shown} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def pages(root: Path = ROOT) -> list[Path]:
    return sorted({path for pattern in PAGES for path in root.glob(pattern)})


def outdated(figures: dict[str, Figure], root: Path = ROOT) -> dict[Path, str]:
    """Pages whose text and data differ, with the text that they should have."""
    texts = {path: render(path.read_text(encoding="utf-8"), figures) for path in pages(root)}
    return {path: text for path, text in texts.items() if path.read_text(encoding="utf-8") != text}


def main(arguments: list[str]) -> int:
    changes = outdated(load_figures())
    for path, text in changes.items():
        print(path.relative_to(ROOT))
        if "--check" not in arguments:
            path.write_text(text, encoding="utf-8")
    return 1 if changes and "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
