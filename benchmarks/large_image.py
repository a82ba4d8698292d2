"""Large images: peak memory and seconds of purifying one file, and the effect of tiling. Linux.

    python benchmarks/large_image.py [PURIFIER ...] [--width 6000] [--height 4000]

Memory is the peak resident size of a fresh process that runs ``codefend purify`` from file to file: libraries,
decoding, tiles and encoding included. Seconds are those of the whole process; measure on an idle machine. Seams: an
image a little over the size from which tiles are used, tiled against whole, clean and with noise of 8/255; stochastic
purifiers are left out, since their draws would differ. Image: scikit-image's astronaut, enlarged.
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
from codefend.core.seeds import make_generator
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


def astronaut(height: int, width: int) -> Tensor:
    """``[1, 3, height, width]`` in [0, 1]."""
    small = torch.from_numpy(data.astronaut().copy()).permute(2, 0, 1)[None].float() / 255
    return F.interpolate(small, (height, width), mode="bicubic", align_corners=False).clamp(0, 1)


def measure(source: Path, purifier: str) -> tuple[float, float]:
    """Peak resident GiB and seconds of the process that purifies the file."""
    command = ["purify", str(source), "-o", str(source.with_name("out.png")), "--purifier", purifier, "--overwrite"]
    start = time.perf_counter()
    process = subprocess.run([sys.executable, "-c", CHILD, *command], capture_output=True, text=True)
    if process.returncode:
        sys.exit(process.stderr)
    return int(process.stdout.split("peak")[-1]) / 2**20, time.perf_counter() - start


def seams(name: str) -> str:
    """Difference between tiled and whole in levels of 255: 99.9th percentile and maximum, of both images."""
    purifier = purifiers.load(name)
    if purifier.stochastic or not purifier.tiled:
        return "-"
    clean, cells = astronaut(*SEAM_SIDES), []
    noise = torch.randn(clean.shape, generator=make_generator(0, "seams")).sign() * 8 / 255
    for image in (clean, (clean + noise).clamp(0, 1)):
        with torch.no_grad(), patch.object(grid, "TILED_ABOVE", 2 * image.numel()):
            whole = purifier(image)
        with torch.no_grad(), patch.object(grid, "TILED_ABOVE", 1):
            difference = (purifier(image) - whole).abs().flatten() * 255
        percentile = float(difference.kthvalue(round(0.999 * difference.numel())).values)
        cells.append(f"{percentile:.3f}, {float(difference.max()):.3f}")
    return "; ".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("purifiers", nargs="*", default=["bridge", "bridge-detail"])
    parser.add_argument("--width", type=int, default=6000)
    parser.add_argument("--height", type=int, default=4000)
    args = parser.parse_args()
    size = f"{args.width} x {args.height} px"
    print(f"| purifier | {size}: peak, GiB | seconds | seams, levels: 99.9%, maximum; the same with noise |")
    print("|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "large.png"
        images.save(source, astronaut(args.height, args.width)[0])
        for name in args.purifiers:
            peak, seconds = measure(source, name)
            print(f"| {name} | {peak:.2f} | {seconds:.0f} | {seams(name)} |", flush=True)


if __name__ == "__main__":
    main()
