"""One megapixel through purifiers: seconds in float32 and in mixed precision, side by side, and their difference.

    python benchmarks/megapixel.py [PURIFIER ...] [--repeats 5]

Medians over alternating repeats, without process start and decoding; measure on an idle machine, with torch's default
number of threads. Image: scikit-image's astronaut at 1024 x 1024.
"""

from __future__ import annotations

import argparse
import os
import time
from statistics import median

import torch
import torch.nn.functional as F
from skimage import data
from torch import Tensor

from codefend import purifiers
from codefend.core.devices import PRECISION, default_device, precision
from codefend.core.seeds import make_generator

MODES = {"float32": "float32", "mixed": ""}  # by name: the variable's value


def astronaut() -> Tensor:
    """``[1, 3, 1024, 1024]`` in [0, 1]."""
    small = torch.from_numpy(data.astronaut().copy()).permute(2, 0, 1)[None].float() / 255
    return F.interpolate(small, (1024, 1024), mode="bicubic", align_corners=False).clamp(0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("purifiers", nargs="*", default=["bridge", "bridge-detail"])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    os.environ[PRECISION] = ""
    print(f"{torch.get_num_threads()} threads; mixed precision here is {precision(default_device())}")
    images = astronaut()
    for name in args.purifiers:
        purifier = purifiers.load(name)
        seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
        results: dict[str, Tensor] = {}
        for turn in range(args.repeats + 1):  # the first warms up
            for mode, value in MODES.items():
                os.environ[PRECISION] = value
                start = time.perf_counter()
                with torch.no_grad():
                    results[mode] = purifier(images, generator=make_generator(0))
                if turn:
                    seconds[mode].append(time.perf_counter() - start)
        exact, mixed = (median(seconds[mode]) for mode in MODES)
        gap = 255 * (results["float32"] - results["mixed"]).abs()
        print(
            f"{name}: float32 {exact:.2f} s, mixed {mixed:.2f} s, {exact / mixed:.2f} times as fast; differs by "
            f"at most {float(gap.max()):.2f} levels of 255, {float(gap.square().mean().sqrt()):.2f} root mean square"
        )


if __name__ == "__main__":
    main()
