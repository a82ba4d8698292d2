"""PSNR of purified clean photographs, held out of all trainings, and multiply-adds of each purifier, as Markdown.

    python benchmarks/photographs.py [PURIFIER ...]

Whole photographs of `tasks.photographs`; `codefend eval photographs` judges crops by encoders. The last table is the
prior as a plain denoiser.
"""

from __future__ import annotations

import sys

import torch

from codefend import purifiers
from codefend.core.assets import asset
from codefend.core.seeds import make_generator
from codefend.purifiers.nets import load_net
from codefend.tasks.metrics import psnr
from codefend.tasks.photographs import load_all
from codefend.tasks.training_images import HELD_OUT

DEFAULT = ("jpeg", "bitdepth", "diffpure:t=0.05,steps=5", "diffpure:t=0.1,steps=10", "bridge")


def main(names: list[str]) -> None:
    photographs = {name: image[None] for name, image in zip(HELD_OUT, load_all(), strict=True)}
    print(f"| clean photograph, dB | {' | '.join(photographs)} | multiply-adds at 128 px |")
    print("|---" * (len(photographs) + 2) + "|")
    for label in names or DEFAULT:
        purifier = purifiers.load(label)
        values = [float(psnr(purifier(x, generator=make_generator(0, name)), x)) for name, x in photographs.items()]
        cells = " | ".join(f"{value:.1f}" for value in values)
        print(f"| {label} | {cells} | {purifier.multiply_adds(128, 128) / 1e6:,.0f} M |")
    net, _ = load_net(asset("weights/prior"))
    x = photographs[HELD_OUT[0]][..., 100:356, 100:356]
    print(f"\n| {HELD_OUT[0]}, 256 px crop, noise in 1/255 | noisy, dB | after the prior, dB |\n|---|---|---|")
    for level in (4, 8, 16, 32):
        sigma = torch.tensor([level / 255])
        noisy = x + sigma * torch.randn(x.shape, generator=make_generator(0, level))
        restored = net(noisy, torch.zeros(1), sigma).clamp(0, 1)
        print(f"| {level} | {float(psnr(noisy, x)):.1f} | {float(psnr(restored, x)):.1f} |")


if __name__ == "__main__":
    with torch.no_grad():
        main(sys.argv[1:])
