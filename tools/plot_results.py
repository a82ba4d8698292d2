"""Plot results/*.json into docs/assets: accuracy.svg, trade-off.svg, cost.svg. Usage: python tools/plot_results.py"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from render_results import ROOT, TWO_STAGE, Figure, interval, load_figures, lowest_figure

OUT = ROOT / "docs" / "assets"
CLEAN = {  # the figure of clean captions that belongs to each curve
    "diffpure:t=0.05,steps=5": "diffpure/peers/clean/caption",
    **{name: f"{name}/clean-strata/caption" for name in ("bridge", "bridge:sigma=0.1", "bridge:sigma=0.2")},
    **{name: f"{name}/clean-strata/caption" for name in ("bridge-large", "bridge-detail")},
}
DIALS = (("bridge:sigma=0.02", "bridge", "bridge:sigma=0.1", "bridge:sigma=0.2"), ("bridge-large",), ("bridge-detail",))
COSTS = ("bridge", "bridge-large", "bridge-detail")


def accuracy(figures: dict[str, Figure]) -> dict[str, list[tuple[int, Figure]]]:
    """Captions by defense: (radius of 255, accuracy under an adaptive attack), the clean one at radius 0."""
    curves = {}
    for name, clean in CLEAN.items():
        points = [
            (eps, figure) for eps in (1, 2, 4, 8) if (figure := lowest_figure(figures, name, str(eps), "caption"))
        ]
        if points and clean in figures:
            curves[name] = [(0, figures[clean]), *points]
    return curves


def trade_off(figures: dict[str, Figure]) -> dict[tuple[str, ...], list[tuple[Figure, Figure]]]:
    """By weights, the points of the dial: (PSNR of clean photographs, accuracy at 4/255)."""
    dials = {}
    for names in DIALS:
        known = {}
        for name in names:
            psnr = figures.get(f"{name}/photographs/psnr", figures.get(f"{name}/families/psnr"))
            point = lowest_figure(figures, name, "4", "caption")
            if psnr and point:
                known[name] = (psnr, point)
        if known:
            dials[tuple(known)] = list(known.values())
    return dials


def cost(figures: dict[str, Figure]) -> dict[str, tuple[Figure, Figure | None, Figure]]:
    """Seconds a megapixel; accuracy under an adaptive attack at 4/255, if known; cosine under an oblivious one."""
    return {
        name: (figures[f"{name}/time/bfloat16"], lowest_figure(figures, name, "4", "caption"), cosine)
        for name in COSTS
        if (cosine := figures.get(f"{name}/families/smolvlm-pocket/8"))
    }


def digest(figures: dict[str, Figure]) -> str:
    """A hash of what the plots show; it stands in the files, so that a test can compare."""
    shown = [accuracy(figures), trade_off(figures), cost(figures)]
    return hashlib.sha256(repr(shown).encode()).hexdigest()


def draw_accuracy(axes: Any, figures: dict[str, Figure]) -> None:
    for number, (name, points) in enumerate(accuracy(figures).items()):
        x = [eps + 0.07 * (number - 2.5) for eps, _ in points]
        found = [figure for _, figure in points]
        weak = not any("/T2/" in f.id and f"/{TWO_STAGE}/" in f.id for f in found)  # an upper bound
        style = {"linestyle": ":", "label": f"{name} (weaker attack)"} if weak else {"label": name}
        axes.errorbar(x, [f.value for f in found], yerr=errors(found), marker="o", capsize=2, **style)
    axes.set(xlabel="radius of the adaptive attack, of 255", ylabel="accuracy, captions", ylim=(-0.03, 1.03))
    axes.legend()


def draw_trade_off(axes: Any, figures: dict[str, Figure]) -> None:
    for names, points in trade_off(figures).items():
        x, y = [psnr.value for psnr, _ in points], [f.value for _, f in points]
        axes.errorbar(x, y, yerr=errors([f for _, f in points]), marker="o", capsize=2)
        left = names[0].partition(":")[0] != "bridge"  # of the point, where another dial's labels do not stand
        for name, *place in zip(names, x, y, strict=True):
            side = {"xytext": (-6, 4), "ha": "right"} if left else {"xytext": (6, 4)}
            axes.annotate(name, place, textcoords="offset points", **side)
    axes.set(xlabel="PSNR of clean photographs, dB", ylabel="accuracy, captions, adaptive 4/255", ylim=(-0.03, 1.03))
    axes.set_xlim(22, 52)


def draw_cost(axes: Any, figures: dict[str, Figure]) -> None:
    for number, (name, (seconds, adaptive, cosine)) in enumerate(cost(figures).items()):
        if adaptive:
            axes.errorbar(
                seconds.value, adaptive.value, yerr=errors([adaptive]), color=f"C{number}", marker="o", capsize=2
            )
        axes.plot(seconds.value, cosine.value, color=f"C{number}", marker="s", markerfacecolor="none", linestyle="")
        axes.plot([], [], color=f"C{number}", linewidth=4, label=name)
    axes.plot([], [], color="grey", marker="o", linestyle="", label="accuracy, captions, adaptive 4/255")
    label = "restored cosine, photographs, ViT, oblivious 8/255"
    axes.plot([], [], color="grey", marker="s", markerfacecolor="none", linestyle="", label=label)
    axes.set(xlabel="seconds a megapixel, two cores, bfloat16", xscale="log", ylim=(-0.03, 1.03))
    axes.set_xticks([0.25, 0.5, 1, 2, 4, 8], ["0.25", "0.5", "1", "2", "4", "8"])
    axes.minorticks_off()
    axes.legend(loc="center right")


def errors(figures: list[Figure]) -> list[list[float]]:
    """How far the 95% intervals reach below and above the values."""
    bounds = [interval(figure) or (figure.value, figure.value) for figure in figures]
    pairs = list(zip(figures, bounds, strict=True))
    return [[f.value - low for f, (low, _) in pairs], [high - f.value for f, (_, high) in pairs]]


PLOTS: dict[str, Callable[[Any, dict[str, Figure]], None]] = {
    "accuracy": draw_accuracy,
    "trade-off": draw_trade_off,
    "cost": draw_cost,
}


def plot(figures: dict[str, Figure], folder: Path = OUT) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "codefend", "svg.fonttype": "none", "font.size": 10})
    from matplotlib import pyplot as plt

    for name, draw in PLOTS.items():
        canvas, axes = plt.subplots(figsize=(6, 3.8), layout="constrained")
        draw(axes, figures)
        canvas.savefig(folder / f"{name}.svg", metadata={"Date": None, "Description": digest(figures)})
        plt.close(canvas)


if __name__ == "__main__":
    plot(load_figures())
