"""What each purifier does to clean photographs that no training saw: PSNR in dB and multiply-adds, as Markdown.

    python benchmarks/photographs.py [PURIFIER ...]

Photographs: scikit-image's, held out by `tasks.pictures.HELD_OUT`. The last table is the prior as a plain denoiser.
"""

from __future__ import annotations

import sys

import torch
from skimage import data
from torch import Tensor

from codefend import purifiers
from codefend.core.runs import make_generator
from codefend.purifiers.nets import load_net
from codefend.tasks.image_metrics import psnr
from codefend.tasks.training_images import HELD_OUT

DEFAULT = ("jpeg", "bitdepth", "diffpure:t=0.05,steps=5", "diffpure:t=0.1,steps=10", "bridge")


def photograph(name: str) -> Tensor:
    return torch.from_numpy(getattr(data, name)().copy()).permute(2, 0, 1)[None].float() / 255


def main(names: list[str]) -> None:
    pictures = {name: photograph(name) for name in HELD_OUT}
    print(f"| clean photograph, dB | {' | '.join(pictures)} | multiply-adds at 128 px |")
    print("|---" * (len(pictures) + 2) + "|")
    for label in names or DEFAULT:
        purifier = purifiers.load(label)
        found = [float(psnr(purifier(x, generator=make_generator(0, name)), x)) for name, x in pictures.items()]
        print(
            f"| {label} | {' | '.join(f'{dB:.1f}' for dB in found)} | {purifier.multiply_adds(128, 128) / 1e6:,.0f} M |"
        )
    net, _ = load_net(purifiers.WEIGHTS / "prior")
    x = pictures[HELD_OUT[0]][..., 100:356, 100:356]
    print(f"\n| {HELD_OUT[0]}, 256 px crop, noise in 1/255 | noisy, dB | after the prior, dB |\n|---|---|---|")
    for level in (4, 8, 16, 32):
        sigma = torch.tensor([level / 255])
        noisy = x + sigma * torch.randn(x.shape, generator=make_generator(0, level))
        restored = net(noisy, torch.zeros(1), sigma).clamp(0, 1)
        print(f"| {level} | {float(psnr(noisy, x)):.1f} | {float(psnr(restored, x)):.1f} |")


if __name__ == "__main__":
    with torch.no_grad():
        main(sys.argv[1:])
