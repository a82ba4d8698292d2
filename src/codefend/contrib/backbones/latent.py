"""Stable Diffusion in latents as a purifier: encode, noise to time t, a few deterministic steps back, decode.

With adapters trained on pairs (`codefend train latent`) this is the paper's own form of the defence (CoDefend,
arXiv 2510.11096: paired, in latents); without them DiffPure in latents. ``t=0`` is the round trip through the
autoencoder alone, an upper bound for all of them: report it in every table. One step is
enough for models distilled for it (SD-Turbo; OSCP, arXiv 2408.17064), ``consistency=true`` for latent consistency
models (Luo et al. 2023, arXiv 2310.04378), which jump to the clean latent and noise it again.

Sizes of the full models: `python benchmarks/backbones.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn

from codefend.contrib.backbones.vp import VPDenoiser, require, require_finite, table_of
from codefend.core.checkpoints import load_weights
from codefend.core.seeds import noise_like
from codefend.core.settings import override
from codefend.purifiers.base import Purifier
from codefend.purifiers.diffpure import denoise_from
from codefend.purifiers.nets import evaluate, per_image
from codefend.types import CodefendError

PREFIX, KIND = "hf-latent:", "latent"
ADAPTERS = "adapters.safetensors"
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")  # every attention of the U-Net, as diffusers' own trainers choose


@dataclass(frozen=True)
class LatentOptions:
    """Options saved with adapters replace these defaults."""

    t: float = 0.15  # share of the model's steps; 0: the autoencoder alone
    steps: int = 4
    eta: float = 0.0  # 0 deterministic (DDIM), 1 ancestral
    consistency: bool = False  # the model maps every level to the clean latent (LCM)
    checkpoint: bool = False
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    def __post_init__(self) -> None:
        if not 0 <= self.t <= 1:
            raise CodefendError(f"hf-latent time t must be 0 to 1, got {self.t:g}")
        if not 1 <= self.steps <= 1000:
            raise CodefendError(f"hf-latent steps must be 1 to 1000, got {self.steps}")
        if not 0 <= self.eta <= 1:
            raise CodefendError(f"hf-latent eta must be 0 to 1, got {self.eta:g}")


class Latents(nn.Module):
    """Autoencoder and denoiser of one Stable Diffusion model, with the embedding of the empty prompt. Frozen."""

    def __init__(self, vae: Any, denoiser: VPDenoiser) -> None:
        super().__init__()
        self.vae, self.denoiser = vae, denoiser
        self.scale, self.shift = float(vae.config.scaling_factor), float(vae.config.shift_factor or 0)
        self.fold = 2 ** (len(vae.config.block_out_channels) - 1)  # pixels to a latent cell
        self.requires_grad_(False).eval()

    def encode(self, images: Tensor) -> Tensor:
        """``[B,3,H,W]`` in [0, 1] -> the distribution's mode ``[B,C,H/fold,W/fold]``, float32, about unit variance."""
        mode: Tensor = self.vae.encode((2 * images - 1).to(self.vae.dtype)).latent_dist.mode()
        return (mode.float() - self.shift) * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        pixels: Tensor = self.vae.decode((latents / self.scale + self.shift).to(self.vae.dtype)).sample
        return pixels.float() / 2 + 0.5


class LatentPurifier(Purifier):
    """Purify in the latents of Stable Diffusion; differentiable through both halves of the autoencoder."""

    name, options_class, evaluations_option = "hf-latent", LatentOptions, "steps"
    options: LatentOptions

    def __init__(self, latents: Latents, options: LatentOptions | None = None, **names: Any) -> None:
        super().__init__(options, **names)
        self.latents = latents
        self.evaluations = self.options.steps if self.options.t > 0 else 0
        self.stochastic = self.options.t > 0
        self.multiple = latents.fold * latents.denoiser.multiple

    def _with_options(self, options: LatentOptions) -> LatentPurifier:
        return LatentPurifier(self.latents, options, name=self.base_name, defaults=self.defaults)

    def transform(self, images: Tensor, generator: Generator | None) -> Tensor:
        weight = next(self.latents.parameters())
        if weight.device != images.device:
            self.latents.to(images.device)
        z = self.latents.encode(images)
        return self.latents.decode(self.denoise(z, generator) if self.options.t > 0 else z)

    def denoise(self, z: Tensor, generator: Generator | None) -> Tensor:
        """Noise latents ``[B,C,h,w]`` to time t, and walk back."""
        o, net = self.options, self.latents.denoiser
        levels = net.levels(o.t, o.steps)
        z = z + float(levels[0]) * noise_like(z, generator)
        if not o.consistency:
            return denoise_from(net, z, levels, eta=o.eta, checkpoint=o.checkpoint, generator=generator)
        s = per_image(0.0, z)
        for level, following in pairwise(levels.tolist()):
            sigma = per_image(level, z)
            skip, out = boundary(net.steps(sigma).view(-1, 1, 1, 1))
            # The model's own input, not the variance-exploding one, is what the skip path carries.
            z0 = skip * z / (1 + level**2) ** 0.5 + out * evaluate(net, z, s, sigma, checkpoint=o.checkpoint)
            z = z0 + following * noise_like(z, generator) if following > 0 else z0
        return z

    def cost(self, height: int, width: int) -> int:
        net, fold = self.latents.denoiser, self.latents.fold
        return self.evaluations * net.multiply_adds(height // fold, width // fold) + _autoencoder(
            self.latents, height, width
        )


def boundary(steps: Tensor, *, data: float = 0.5, stretch: float = 10.0) -> tuple[Tensor, Tensor]:
    """c_skip and c_out that make a consistency function the identity at step 0 (Song et al. 2023, arXiv 2303.01469,
    appendix C, with latent consistency models' stretch of the step)."""
    scaled = stretch * steps
    return data**2 / (scaled**2 + data**2), scaled / (scaled**2 + data**2).sqrt()


def _autoencoder(latents: Latents, height: int, width: int) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    weight = next(latents.parameters())
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        latents.decode(latents.encode(torch.zeros(1, 3, height, width, dtype=weight.dtype, device=weight.device)))
    return int(counter.get_total_flops() // 2)


def load_latents(source: str, dtype: str = "float32") -> Latents:
    """Stable Diffusion 1.x, 2.x, XL, their Turbos or latent consistency models; only safetensors are read.

    ``source`` is an id or a folder. Raises CodefendError when it cannot be loaded or is of another kind.
    """
    diffusers = require()
    if source.startswith((".", "/", "~")) and not Path(source).expanduser().is_dir():
        raise CodefendError(f"no such model folder: {source}")
    place = str(Path(source).expanduser()) if Path(source).expanduser().is_dir() else source
    kind: Any = diffusers.DiffusionPipeline
    try:
        unused = dict.fromkeys({"safety_checker", "feature_extractor"} & set(kind.load_config(place)))
        pipe = kind.from_pretrained(place, dtype=getattr(torch, dtype), use_safetensors=True, **unused)
    except Exception as error:  # OSError, ValueError, KeyError and more
        raise CodefendError(f"cannot load {source!r}: {str(error).strip().splitlines()[0]}") from error
    parts = [getattr(pipe, part, None) for part in ("vae", "unet", "scheduler", "encode_prompt")]
    if None in parts or pipe.unet.config.in_channels != pipe.vae.config.latent_channels:
        raise CodefendError(f"{source!r} is a {type(pipe).__name__}; a Stable Diffusion text-to-image model is needed")
    require_finite(source, pipe.vae, pipe.unet)
    conditions = _conditions(pipe, source)
    if "text_embeds" in conditions and dtype == "float16" and pipe.vae.config.force_upcast:
        pipe.vae.to(torch.float32)  # SDXL's first autoencoder overflows in float16
    table = table_of(pipe.scheduler, source)
    cell = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    return Latents(
        pipe.vae, VPDenoiser(pipe.unet, pipe.scheduler.config, table, pixels=False, conditions=conditions, cell=cell)
    )


@torch.no_grad()
def _conditions(pipe: Any, source: str) -> dict[str, Tensor]:
    """The U-Net's inputs besides latent and step for an empty prompt, one row each.

    Raises CodefendError for a model with other inputs.
    """
    config, cpu = pipe.unet.config, torch.device("cpu")
    if config.addition_embed_type == "text_time":
        # The pipeline's negative prompt is the model's input without text in training, zeros where those were used.
        _, words, _, pooled = pipe.encode_prompt("", device=cpu, do_classifier_free_guidance=True)
        if config.projection_class_embeddings_input_dim != 6 * config.addition_time_embed_dim + pooled.shape[1]:
            raise CodefendError(f"{source!r} needs more inputs than sizes (a refiner?); use the base model")
        conditions = {"encoder_hidden_states": words, "text_embeds": pooled}
    elif config.addition_embed_type is None:
        conditions = {"encoder_hidden_states": pipe.encode_prompt("", cpu, 1, False)[0]}
    else:
        raise CodefendError(f"{source!r} is conditioned on {config.addition_embed_type}, which is not supported")
    if config.time_cond_proj_dim:  # a consistency model, without guidance
        scale = pipe.get_guidance_scale_embedding(torch.zeros(1), embedding_dim=config.time_cond_proj_dim)
        conditions["timestep_cond"] = scale.to(pipe.unet.dtype)
    return conditions


def add_adapters(latents: Latents, rank: int) -> dict[str, nn.Parameter]:
    """LoRA on every attention (Hu et al. 2021, arXiv 2106.09685): the new parameters by name, zero at first."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(LORA_TARGETS), lora_dropout=0.0)
    inject_adapter_in_model(config, latents.denoiser.model)
    return {name: p for name, p in latents.denoiser.model.named_parameters() if p.requires_grad}


def save_adapters(
    folder: str | Path, base: str, rank: int, parameters: Mapping[str, Tensor], options: Mapping[str, Any]
) -> None:
    """Write adapters so that the folder is a purifier's; ``base`` is what `load_latents` takes."""
    from safetensors.torch import save

    from codefend.core.files import write_atomic

    state = {name: value.detach().to("cpu", torch.float32).contiguous() for name, value in parameters.items()}
    meta = {"format": 1, "kind": KIND, "base": base, "rank": rank, "options": dict(options)}
    write_atomic(Path(folder) / ADAPTERS, save(state))
    write_atomic(Path(folder) / "config.json", json.dumps(meta, indent=2) + "\n")


def read_meta(folder: Path) -> dict[str, Any]:
    """The config next to the adapters. Raises CodefendError when it is missing or damaged."""
    try:
        meta: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return {**meta, "base": str(meta["base"]), "rank": int(meta["rank"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CodefendError(f"{folder} holds adapters without a readable config.json ({error})") from error


def from_folder(folder: Path, meta: Mapping[str, Any], settings: Mapping[str, object]) -> LatentPurifier:
    """The purifier that `save_adapters` wrote. Raises CodefendError for adapters of another model and wrong options."""
    defaults = override(LatentOptions(), meta.get("options", {}))
    options = override(defaults, settings)
    latents = load_latents(meta["base"], options.dtype)
    own = add_adapters(latents, int(meta["rank"]))
    try:
        state = load_weights(folder / ADAPTERS)
    except CodefendError:
        raise
    except Exception as error:
        raise CodefendError(f"{folder} holds no readable {ADAPTERS}: {str(error).splitlines()[0]}") from error
    if {name: value.shape for name, value in state.items()} != {name: p.shape for name, p in own.items()}:
        raise CodefendError(f"the adapters of {folder} don't fit {meta['base']!r}")
    for name, parameter in own.items():
        parameter.data.copy_(state[name])
    latents.requires_grad_(False)
    return LatentPurifier(latents, options, name=folder.resolve().name, defaults=defaults)


def build_latent(name: str, settings: Mapping[str, object]) -> LatentPurifier:
    """``hf-latent:ID_OR_FOLDER``. Raises CodefendError for a wrong option before anything is loaded."""
    options = override(LatentOptions(), settings)
    source = name.removeprefix(PREFIX)
    if not source:
        raise CodefendError(f"name a model, as in {PREFIX}stabilityai/sd-turbo or {PREFIX}./folder")
    if (Path(source) / ADAPTERS).is_file():
        return from_folder(Path(source), read_meta(Path(source)), settings)
    return LatentPurifier(load_latents(source, options.dtype), options, name=name)
