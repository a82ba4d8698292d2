"""Unconditional pixel diffusion models of `diffusers` (DDPMPipeline, UNet2DModel) as DiffPure and as bridges.

Memory and work of the full models, from their shapes alone: `python benchmarks/backbones.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from codefend.contrib.backbones.vp import FIXED, LEARNED, VPDenoiser, load_part, require, require_finite, table_of
from codefend.core.settings import override
from codefend.purifiers.bridge import Bridge, BridgeOptions
from codefend.purifiers.diffpure import DiffPure, DiffPureOptions
from codefend.purifiers.guidance import encoder_names
from codefend.purifiers.nets import SHIFT_DATA
from codefend.types import CodefendError

DIFFPURE, BRIDGE = "hf-diffpure:", "hf-bridge:"


@dataclass(frozen=True)
class HFDiffPureOptions(DiffPureOptions):
    """As `DiffPureOptions`, for models of the whole range of ``t`` (0.15: the paper's ImageNet setting)."""

    label, limit = "hf-diffpure", (1.0, "")
    t: float = 0.15
    steps: int | None = 15


def load_denoiser(source: str, *, shift: float = SHIFT_DATA) -> VPDenoiser:
    """The model of a DDPM pipeline or UNet2DModel, id or folder, float32, eval mode; only safetensors are read.

    Raises CodefendError when it cannot be loaded, is conditional on a class, or is no variance-preserving pixel model.
    """
    diffusers = require()
    if source.startswith((".", "/", "~")) and not Path(source).expanduser().is_dir():
        raise CodefendError(f"no such model folder: {source}")
    source = str(Path(source).expanduser()) if Path(source).expanduser().is_dir() else source
    try:
        model = load_part(diffusers.UNet2DModel, source, "unet", use_safetensors=True)
        learned = model.config.out_channels == 6
        scheduler = diffusers.DDPMScheduler(variance_type=LEARNED if learned else FIXED)
        if not _bare(source):
            scheduler = load_part(diffusers.DDPMScheduler, source, "scheduler")
    except CodefendError:
        raise
    except Exception as error:  # the library raises ValueError, RuntimeError, SafetensorError and more
        raise CodefendError(f"cannot load {source!r}: {str(error).strip().splitlines()[0]}") from error
    require_finite(source, model)
    config = model.config
    if config.in_channels != 3 or config.num_class_embeds or config.class_embed_type:
        raise CodefendError(f"{source!r} is no unconditional model of colour images")
    if config.out_channels not in (3, 6):  # 6: the noise, then its learned variance, as in guided-diffusion
        raise CodefendError(f"{source!r} returns {config.out_channels} channels; 3, or 6 with a learned variance")
    net = VPDenoiser(model, scheduler.config, table_of(scheduler, source), pixels=True, shift=shift)
    return net.requires_grad_(False).eval()


def _bare(source: str) -> bool:
    """A folder with a UNet2DModel alone, as its `save_pretrained` writes; the table is then diffusers' default."""
    folder = Path(source)
    return folder.is_dir() and not any(folder.glob("*model_index.json")) and not any(folder.rglob("scheduler_config*"))


def build_diffpure(name: str, settings: Mapping[str, object]) -> DiffPure:
    """``hf-diffpure:ID_OR_FOLDER``. Raises CodefendError for a wrong option before anything is loaded."""
    options = override(HFDiffPureOptions(), settings)
    net: Any = load_denoiser(_source(name, DIFFPURE))
    return DiffPure(net, options, name=name)


def build_bridge(name: str, settings: Mapping[str, object]) -> Bridge:
    """``hf-bridge:ID_OR_FOLDER``: the model at s = 1, one evaluation, no noise. Fine-tune it first.

    Raises CodefendError for a wrong option before anything is loaded.
    """
    options = override(BridgeOptions(), settings)
    encoder_names(options.guides)
    if options.gate:
        raise CodefendError(f"{name} has no detection score to open a gate by: leave gate=true out")
    net: Any = load_denoiser(_source(name, BRIDGE))
    return Bridge(net, options, name=name)


def _source(name: str, prefix: str) -> str:
    source = name.removeprefix(prefix)
    if not source:
        raise CodefendError(f"name a model, as in {prefix}google/ddpm-ema-church-256 or {prefix}./folder")
    return source


def save_denoiser(net: VPDenoiser, folder: str | Path, *, scheduler: Any = None) -> None:
    """Write the model as a DDPMPipeline, for ``hf-bridge:FOLDER`` and for diffusers alike."""
    diffusers = require()
    table = net.get_buffer("sigmas").double().cpu()
    if scheduler is None:
        abar = 1 / (1 + (net.gain * table) ** 2)
        betas = 1 - abar / torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
        variants = {"prediction_type": net.prediction, "variance_type": net.variance}
        scheduler = diffusers.DDPMScheduler(num_train_timesteps=len(table), trained_betas=betas.tolist(), **variants)
    diffusers.DDPMPipeline(net.model, scheduler).save_pretrained(folder)
