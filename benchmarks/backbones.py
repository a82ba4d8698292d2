"""Cost of the full-size models of diffusers: parameters, work, memory and time, counted from shapes without weights.

    python benchmarks/backbones.py

No weights are needed: the models run on fake tensors. Work: multiply-adds of convolutions, linear layers and attention
for one image. Memory: weights, and the peak of activations for one image in float32 (half of it in 16 bits); training
with micro-batches of one image stores the activations for the backward pass, and for each trained weight its gradient,
two moments and the average in float32 (adapters: rank 16 on every attention). Time is work divided by a rate, not a
measurement: 0.09 TFLOP/s (one core with AVX2) and 50 TFLOP/s (a data-centre GPU in 16 bits, far from its peak).
Workspaces of libraries are not counted.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

RANK = 16
RATES = (0.09e12, 50e12)  # FLOP/s; a multiply-add is two
SD = {"block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2, "in_channels": 4, "out_channels": 4}
XL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "in_channels": 4,
    "out_channels": 4,
}
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
GUIDED = {  # guided-diffusion's 256 px: its widths, depth, attention at 32, 16 and 8, and learned variance
    "block_out_channels": (256, 256, 512, 512, 1024, 1024),
    "down_block_types": ("DownBlock2D",) * 3 + ("AttnDownBlock2D",) * 3,
    "up_block_types": ("AttnUpBlock2D",) * 3 + ("UpBlock2D",) * 3,
    "layers_per_block": 2,
    "attention_head_dim": 64,
    "resnet_time_scale_shift": "scale_shift",
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "out_channels": 6,
}


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of live tensors that operations created; ``peak`` is their maximum."""

    def __init__(self, *models: nn.Module) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.sizes = {p.untyped_storage()._cdata: 0 for model in models for p in model.parameters()}  # no result

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.sizes:
                storage = tensor.untyped_storage()
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, storage._cdata)
        return out

    def _freed(self, storage: int) -> None:
        self.now -= self.sizes.pop(storage)


@dataclass(frozen=True)
class Cost:
    """Of one call: multiply-adds, and bytes of activations without and with a backward pass."""

    adds: float
    inference: int
    training: int


def measure(model: nn.Module, run: Callable[[], Tensor]) -> Cost:
    """``run`` must need a gradient, of its input or of weights."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter, LiveBytes(model) as inference:
        run()
    with LiveBytes(model) as training:
        run().sum().backward()
    return Cost(counter.get_total_flops() / 2, inference.peak, training.peak)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def adapters(model: nn.Module) -> int:
    layers = [m for n, m in model.named_modules() if n.endswith(("to_q", "to_k", "to_v", "to_out.0"))]
    return sum(RANK * (layer.in_features + layer.out_features) for layer in layers)


def line(name: str, weights: int, trained: int, cost: Cost, *, evaluations: int = 1) -> None:
    adds, millions = cost.adds * evaluations, f"{weights / 1e6:.0f} M | {trained / 1e6:.1f} M"
    training = f"{(4 * weights + 16 * trained + cost.training) / 1e9:.1f}" if trained else "-"
    sizes = " | ".join(f"{value / 1e9:.1f}" for value in (2 * weights, 4 * weights, cost.inference))
    seconds = " | ".join(f"{2 * adds / rate:,.3g}" for rate in RATES)
    print(f"| {name} | {millions} | {adds / 1e9:,.0f} | {sizes} | {training} | {seconds} |", flush=True)


def pixel_models() -> None:
    for name, shape in (("DDPM 256 px (google/ddpm-*-256)", DDPM), ("guided-diffusion's 256 px", GUIDED)):
        model = UNet2DModel(sample_size=256, **shape)
        x, step = torch.zeros(1, 3, 256, 256), torch.zeros(1)
        cost = measure(model, lambda model=model, x=x, step=step: model(x, step).sample)
        line(f"{name}: hf-bridge, 1 evaluation", parameters(model), parameters(model), cost)
        line(f"{name}: hf-diffpure, 15", parameters(model), 0, cost, evaluations=15)


def latent_models() -> None:
    vae, words = AutoencoderKL(sample_size=512, **VAE).requires_grad_(False), torch.zeros
    for side, kinds in ((512, (("1.5", 768, 8), ("2.1, Turbo", 1024, (5, 10, 20, 20)))), (1024, (("XL", 2048, None),))):
        image = torch.zeros(1, 3, side, side, requires_grad=True)
        line(f"autoencoder alone (t=0), {side} px", parameters(vae), 0, measure(vae, lambda x=image: vae(x).sample))
        for name, width, heads in kinds:
            shape = XL if heads is None else {**SD, "cross_attention_dim": width, "attention_head_dim": heads}
            unet = UNet2DConditionModel(**shape).requires_grad_(False)
            more = {"text_embeds": words(1, 1280), "time_ids": words(1, 6)} if heads is None else None
            z, text = torch.zeros(1, 4, side // 8, side // 8, requires_grad=True), words(1, 77, width)
            cost = measure(unet, lambda u=unet, z=z, t=text, m=more: u(z, words(1), t, added_cond_kwargs=m).sample)
            line(f"Stable Diffusion {name}, {side} px: its U-Net, 1", parameters(unet), adapters(unet), cost)
            line(f"Stable Diffusion {name}, {side} px: its U-Net, 4", parameters(unet), 0, cost, evaluations=4)


def main() -> None:
    heads = ("model, evaluations", "weights", "trained", "multiply-adds, 10^9", "weights in 16 bits, GB", "in 32, GB")
    heads += ("activations, GB", "training, GB", *(f"s at {rate / 1e12:g} TFLOP/s" for rate in RATES))
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    with FakeTensorMode():
        pixel_models()
        latent_models()


if __name__ == "__main__":
    main()
