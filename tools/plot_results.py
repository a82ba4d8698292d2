"""Plot adaptive robustness from results/*.json into docs/assets/results.svg. Usage: python tools/plot_results.py"""

from __future__ import annotations

import hashlib
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from render_results import ROOT, Figure, interval, load_figures

OUT = ROOT / "docs" / "assets" / "results.svg"
RADIUS = re.compile(r"(.+)/T2/word-head/(\d+)/caption")
NAMES = ("bridge", "bridge:sigma=0.1", "bridge-coarse", "bridge-detail", "bridge-large")


def curves(figures: dict[str, Figure]) -> dict[str, list[tuple[int, Figure]]]:
    """Adaptive accuracy on captions by defense: (radius of 255, figure), by radius."""
    points: dict[str, list[tuple[int, Figure]]] = {name: [] for name in NAMES}
    for figure in figures.values():
        match = RADIUS.fullmatch(figure.id)
        if match and match[1] in points:
            points[match[1]].append((int(match[2]), figure))
    return {name: sorted(found, key=lambda point: point[0]) for name, found in points.items()}


def digest(figures: dict[str, Figure]) -> str:
    """A hash of what the plot shows; it stands in the file, so that a test can compare."""
    shown = [(name, [(eps, f.value, f.n) for eps, f in points]) for name, points in curves(figures).items()]
    shown += [(name, figures[f"{name}/photographs/psnr"].value) for name in NAMES]
    return hashlib.sha256(repr(shown).encode()).hexdigest()


def plot(figures: dict[str, Figure], out: Path = OUT) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "codefend", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot as plt

    canvas, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for number, (name, points) in enumerate(curves(figures).items()):
        colour = f"C{number}"
        x, y = [eps + 0.06 * (number - 2) for eps, _ in points], [f.value for _, f in points]
        bounds = [interval(f) or (f.value, f.value) for _, f in points]
        errors = [
            [v - low for v, (low, _) in zip(y, bounds, strict=True)],
            [high - v for v, (_, high) in zip(y, bounds, strict=True)],
        ]
        left.errorbar(x, y, yerr=errors, color=colour, marker="o", capsize=2, label=name)
        psnr = figures[f"{name}/photographs/psnr"].value
        for eps, figure in points:
            if eps in (2, 4):
                right.plot(psnr, figure.value, color=colour, marker="o" if eps == 2 else "^", linestyle="")
    left.set(xlabel="radius of the attack, of 255", ylabel="robust accuracy, captions (T2)", ylim=(-0.03, 1.03))
    right.set(xlabel="PSNR of clean photographs, dB", ylabel="robust accuracy, captions (T2)", ylim=(-0.03, 1.03))
    left.legend()
    for marker, text in (("o", "2/255"), ("^", "4/255")):
        right.plot([], [], color="grey", marker=marker, linestyle="", label=text)
    right.legend()
    canvas.savefig(out, metadata={"Date": None, "Description": digest(figures)})
    plt.close(canvas)


if __name__ == "__main__":
    plot(load_figures())
