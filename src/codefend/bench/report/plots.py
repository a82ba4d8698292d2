"""Plots as SVG text, drawn without a display and without global state."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.figure import Figure

from codefend.bench.results import BARE, CLEAN, THREATS, WORST, Entry

if TYPE_CHECKING:
    from codefend.bench.report.certificates import Curve
    from codefend.bench.report.transfer import TransferCell

# Okabe & Ito 2008: distinct with any kind of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
MARKERS = "osD^vPX"
DODGE = 0.012  # of the largest eps, between lines that would hide one another
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "codefend",  # the same file for the same rows
    "svg.fonttype": "none",  # text stays text
    "font.family": ["sans-serif"],
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def score_against_eps(entries: Sequence[Entry], task: str) -> str:
    """Worst case over attacks against eps, one line per defense, one panel per threat; "" without attacks."""
    mine = [entry for entry in entries if entry.group.task == task]
    # An attack with a bound of its own has no eps: its worst case is no point of the curve.
    worst = [entry for entry in mine if entry.group.attack == WORST and entry.group.eps > 0]
    threats = [threat for threat in THREATS if any(entry.group.threat == threat for entry in worst)]
    defenses = list(dict.fromkeys(entry.group.defense for entry in mine))
    if not threats:
        return ""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(1.4 + 4.2 * len(threats), 3.6), layout="constrained")
        axes = figure.subplots(1, len(threats), sharey=True, squeeze=False)[0]
        for axis, threat in zip(axes, threats, strict=True):
            _panel(axis, mine, worst, threat, defenses)
        axes[0].set_ylabel(mine[0].metric.replace("_", " "))
        handles, labels = axes[0].get_legend_handles_labels()
        for axis in axes[1:]:
            more = zip(*axis.get_legend_handles_labels(), strict=True)
            for handle, label in more:
                if label not in labels:
                    handles, labels = [*handles, handle], [*labels, label]
        figure.legend(handles, labels, loc="outside right upper", frameon=False)
        return _svg(figure)


def heat_map(cells: Sequence[TransferCell]) -> str:
    """Attack success rate of each pair of victims with its denominator; rows: crafted on, columns: evaluated on."""
    crafters, judges = (list(dict.fromkeys(getattr(cell, side) for cell in cells)) for side in ("crafter", "judge"))
    grid = [[math.nan] * len(judges) for _ in crafters]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(2.6 + 1.5 * len(judges), 1.4 + 0.8 * len(crafters)), layout="constrained")
        axis = figure.subplots()
        for cell in cells:
            row, column = crafters.index(cell.crafter), judges.index(cell.judge)
            rate = cell.success
            share = grid[row][column] = rate.share
            text = f"{share:.0%}\n{rate.hits}/{rate.n}" if rate.n else "–"
            axis.text(column, row, text, ha="center", va="center", color="white" if share > 0.55 else "black")
        image = axis.imshow(grid, vmin=0, vmax=1, cmap="Blues", aspect="auto")
        axis.set_xticks(range(len(judges)), [textwrap.fill(name, 18) for name in judges])
        axis.set_yticks(range(len(crafters)), [textwrap.fill(name, 18) for name in crafters])
        axis.set_xlabel("evaluated on")
        axis.set_ylabel("crafted on")
        axis.spines[:].set_visible(False)
        figure.colorbar(image, label="attack success rate")
        return _svg(figure)


def certified_accuracy(curves: Sequence[Curve]) -> str:
    """Certified accuracy against radius, one falling line of steps per defense."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axis = figure.subplots()
        for place, curve in enumerate(curves):
            radii = sorted(row[curve.radius] if row[curve.right] else 0.0 for row in curve.rows)
            shares = [1 - index / len(radii) for index in range(1, len(radii) + 1)]
            start = sum(radius > 0 for radius in radii) / len(radii)
            label = f"{curve.defense} (noise {curve.rows[0]['sigma']:.3g}, n={len(radii)})"
            axis.step([0.0, *radii], [start, *(min(s, start) for s in shares)], where="post", label=label,
                      color=COLOURS[place % len(COLOURS)])  # fmt: skip
        axis.set(xlabel="certified radius (l2)", ylabel="certified accuracy", ylim=(0, 1.02), xlim=(0, None))
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
        return _svg(figure)


def _panel(axis: Any, mine: Sequence[Entry], worst: Sequence[Entry], threat: str, defenses: Sequence[str]) -> None:
    for place, defense in enumerate(defenses):
        bare = {e.group.threat for e in worst if e.group.defense == BARE}
        own = "T0" if defense == BARE and "T0" in bare else threat  # drawn next to every threat
        points = [e for e in mine if e.group.defense == defense and e.group.attack == CLEAN]
        attacked = [e for e in worst if e.group.defense == defense and e.group.threat == own]
        if attacked:
            shift = (place - (len(defenses) - 1) / 2) * DODGE * max(e.group.eps for e in worst)
            _line(axis, sorted(points + attacked, key=lambda e: e.group.eps), defense, place, shift)
    scale = 255 if mine[0].norm == "linf" else 1
    ticks = sorted({0.0} | {e.group.eps * scale for e in worst})
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_xlabel("eps (1/255)" if scale == 255 else "eps (l2)")
    axis.set_title(f"{threat}, worst case over attacks, 95% CI", fontsize=10, loc="left")
    axis.set_ylim(bottom=min(0.0, axis.get_ylim()[0]))
    axis.grid(axis="y", alpha=0.3)


def _line(axis: Any, points: Sequence[Entry], defense: str, place: int, shift: float) -> None:
    scale = 255 if points[0].norm == "linf" else 1
    low, high = ([_reach(e, side) for e in points] for side in ("low", "high"))
    bare = defense == BARE
    axis.errorbar(
        [(e.group.eps + shift) * scale for e in points],
        [e.score.mean for e in points],
        yerr=[low, high],
        label="undefended" if bare else defense,
        color="#444444" if bare else COLOURS[place % len(COLOURS)],
        linestyle="--" if bare else "-",
        marker="x" if bare else MARKERS[place % len(MARKERS)],
        markersize=5,
        capsize=2,
        linewidth=1.6,
        elinewidth=0.8,
    )


def _reach(entry: Entry, side: str) -> float:
    end = getattr(entry.score, side)
    return 0.0 if math.isnan(end) else abs(end - entry.score.mean)


def _svg(figure: Figure) -> str:
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    return stream.getvalue()
