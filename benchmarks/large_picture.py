"""Large pictures: peak memory and seconds of purifying one file, and what tiling changes. Linux.

    python benchmarks/large_picture.py [PURIFIER ...] [--width 6000] [--height 4000]

Memory is the most that was resident in a fresh process that runs ``codefend purify`` from file to file: libraries,
decoding, tiles and encoding included. Seconds are those of the whole process, and mean something on an idle machine
only. Seams: a picture a little over the size from which tiles are used, tiled and whole, as it is and with noise of
8/255; purifiers that draw noise are left out, since they would draw other noise. Pictures: scikit-image's astronaut,
enlarged.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from skimage import data
from torch import Tensor

from codefend import purifiers
from codefend.core import images
from codefend.core.runs import make_generator
from codefend.purifiers import grid

SEAM_SIDES = (1280, 1792)  # 2.3 megapixels: four tiles
CHILD = """
import sys
from codefend.cli import main
code = main(sys.argv[1:])
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print("peak", peak.split()[1])
sys.exit(code)
"""


def picture(height: int, width: int) -> Tensor:
    """``[1, 3, height, width]`` in [0, 1]."""
    small = torch.from_numpy(data.astronaut().copy()).permute(2, 0, 1)[None].float() / 255
    return F.interpolate(small, (height, width), mode="bicubic", align_corners=False).clamp(0, 1)


def purified(source: Path, purifier: str) -> tuple[float, float]:
    """Peak resident GiB and seconds of the process that purifies the file."""
    command = ["purify", str(source), "-o", str(source.with_name("out.png")), "--purifier", purifier, "--overwrite"]
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", CHILD, *command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return int(done.stdout.split("peak")[-1]) / 2**20, time.perf_counter() - started


def seams(name: str) -> str:
    """Levels of 255 between tiled and whole: the 99.9th percentile and the most, of both pictures."""
    purifier = purifiers.load(name)
    if purifier.stochastic or not purifier.tiled:
        return "-"
    clean, found = picture(*SEAM_SIDES), []
    noise = torch.randn(clean.shape, generator=make_generator(0, "seams")).sign() * 8 / 255
    for seen in (clean, (clean + noise).clamp(0, 1)):
        with torch.no_grad(), patch.object(grid, "TILED_ABOVE", 2 * seen.numel()):
            whole = purifier(seen)
        with torch.no_grad(), patch.object(grid, "TILED_ABOVE", 1):
            apart = (purifier(seen) - whole).abs().flatten() * 255
        found.append(f"{float(apart.kthvalue(round(0.999 * apart.numel())).values):.3f}, {float(apart.max()):.3f}")
    return "; ".join(found)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("purifiers", nargs="*", default=["bridge", "bridge-detail"])
    parser.add_argument("--width", type=int, default=6000)
    parser.add_argument("--height", type=int, default=4000)
    asked = parser.parse_args()
    size = f"{asked.width} x {asked.height} px"
    print(f"| purifier | {size}: peak, GiB | seconds | seams, levels: 99.9%, most; the same with noise |")
    print("|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "large.png"
        images.save(source, picture(asked.height, asked.width)[0])
        for name in asked.purifiers:
            peak, seconds = purified(source, name)
            print(f"| {name} | {peak:.2f} | {seconds:.0f} | {seams(name)} |", flush=True)


if __name__ == "__main__":
    main()
