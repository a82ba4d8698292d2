"""What the full-size models of diffusers cost: parameters, work and memory, counted from their shapes without weights.

    python benchmarks/backbones.py

Work: multiply-adds of convolutions, linear layers and attention for one picture, counted on the `meta` device. Memory:
weights alone in float16 and float32; training adds to the weights two moments, the average and the gradient of what is
trained, in float32 (adapters: rank 16 on every attention), and activations, which aren't counted.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

RANK = 16
SD = {"block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2, "in_channels": 4, "out_channels": 4}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
DDPM = {
    "block_out_channels": (128, 128, 256, 256, 512, 512),
    "down_block_types": ("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
    "layers_per_block": 2,
}


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def adapters(model: nn.Module) -> int:
    layers = [m for n, m in model.named_modules() if n.endswith(("to_q", "to_k", "to_v", "to_out.0"))]
    return sum(RANK * (layer.in_features + layer.out_features) for layer in layers)


def work(run: Any) -> float:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 2e9


def line(name: str, weights: int, trained: int, multiply_adds: float) -> None:
    gigabytes = [weights * size / 1e9 for size in (2, 4)]
    training = gigabytes[1] + 16 * trained / 1e9
    sizes = " | ".join(f"{value:.1f}" for value in (*gigabytes, training))
    print(f"| {name} | {weights / 1e6:.0f} M | {trained / 1e6:.1f} M | {multiply_adds:,.0f} | {sizes} |")


def main() -> None:
    print("| model | weights | trained | multiply-adds, 10^9 | float16, GB | float32, GB | training, GB |")
    print("|---" * 7 + "|")
    with torch.device("meta"):
        x, step = torch.zeros(1, 3, 256, 256), torch.zeros(1)
        pixel = UNet2DModel(sample_size=256, **DDPM).to("meta")
        weights = parameters(pixel)
        line("DDPM 256 px (google/ddpm-*-256), one evaluation", weights, weights, work(lambda: pixel(x, step)))
        vae = AutoencoderKL(sample_size=512, **VAE).to("meta")
        picture = torch.zeros(1, 3, 512, 512)
        line("Stable Diffusion's autoencoder, 512 px", parameters(vae), 0, work(lambda: vae(picture)))
        for name, width, heads in (("1.5", 768, 8), ("2.1 and SD-Turbo", 1024, (5, 10, 20, 20))):
            unet = UNet2DConditionModel(cross_attention_dim=width, attention_head_dim=heads, **SD).to("meta")
            z, words = torch.zeros(1, 4, 64, 64), torch.zeros(1, 77, width)
            adds = work(lambda unet=unet, z=z, words=words: unet(z, step, words))
            line(f"Stable Diffusion {name}, 512 px, one evaluation", parameters(unet), adapters(unet), adds)


if __name__ == "__main__":
    main()
