"""Check weights for catastrophic overfitting: one attack step against twenty, both through the purifier.

A network that has only learned to resist the single step of its training keeps the features under that step and loses
them under PGD-20 (Wong et al. 2020, arXiv 2001.03994). Figures are mean cosines of EfficientNet-Lite0 features to the
clean ones, on dead leaves and training photographs.

    python benchmarks/overfitting.py runs/robust/weights [--eps 4] [--samples 12] [--images 4]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from codefend import encoders
from codefend.attacks.pgd import PGD
from codefend.core.seeds import noise_like
from codefend.purifiers.base import clip
from codefend.purifiers.nets import PurifierNet, load_net
from codefend.tasks.natural_images import NaturalConfig, NaturalImages
from codefend.training.mining import n_fgsm
from codefend.types import Budget

SIDE = 96  # pixels


def cosines(net: PurifierNet, clean: Tensor, level: float, args: argparse.Namespace) -> list[float]:
    """Mean cosine after purification with noise ``level``: clean, after one step, after PGD-20."""
    encoder, generator = encoders.shared("lite0"), Generator().manual_seed(0)
    sigma, eps = torch.full((len(clean),), level), torch.full((len(clean),), args.eps / 255)
    with torch.no_grad():
        tokens = encoder(clean)

    def cosine(images: Tensor) -> Tensor:
        return F.cosine_similarity(encoder(images), tokens, dim=-1).mean(1)

    def objective(images: Tensor) -> Tensor:
        return cosine(clip(net(images + level * noise_like(images, generator), torch.ones_like(sigma), sigma)))

    single = n_fgsm(net, cosine, clean, eps=eps, sigma=sigma, start=1.0, generator=generator)
    net.requires_grad_(False)  # which the step has reset
    single = torch.minimum(torch.maximum(single, clean - args.eps / 255), clean + args.eps / 255)
    budget = Budget(eps=args.eps / 255, steps=20, eot=args.samples if level else 1)
    strong = PGD()(objective, clean, budget, generator=generator)
    with torch.no_grad():
        return [float(torch.stack([objective(x) for _ in range(4)]).mean()) for x in (clean, single, strong)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", nargs="+", type=Path)
    parser.add_argument("--eps", type=int, default=4, help="in 1/255")
    parser.add_argument("--samples", type=int, default=4, help="of noise per gradient")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--sigmas", type=float, nargs="+", default=[0.0, 0.03], help="noise levels")
    parser.add_argument("--cache", default="runs/canvases.safetensors", help="of the dead leaves")
    args = parser.parse_args()
    torch.set_num_threads(1)
    source = NaturalImages(NaturalConfig(shares=(0.5, 0.5, 0.0), cache=args.cache), first_scene=0)
    clean = source.draw(np.random.default_rng(77), args.images, SIDE, number=0)
    print("| weights | noise | clean | one step | PGD-20 |\n|---|---|---|---|---|")
    for folder in args.weights:
        net = load_net(folder)[0]
        for level in args.sigmas:
            cells = " | ".join(f"{value:.3f}" for value in cosines(net, clean, level, args))
            print(f"| {folder} | {level:g} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
