"""Tiny random models of the real diffusers classes, written to a folder without a network."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

lib: Any = import_module("diffusers")
tf: Any = import_module("transformers")
DOWN, UP = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")


def unet(**changes: Any) -> Any:
    """An unconditional pixel model of two levels."""
    torch.manual_seed(0)
    shape = {"sample_size": 16, "block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}
    blocks = {"down_block_types": DOWN, "up_block_types": UP, "attention_head_dim": 4}
    return lib.UNet2DModel(**{**shape, **blocks, **changes}).eval()


def ddpm(folder: Path, *, prediction: str = "epsilon", variance: str = "fixed_small", **changes: Any) -> Path:
    scheduler = lib.DDPMScheduler(prediction_type=prediction, variance_type=variance)
    lib.DDPMPipeline(unet(**changes), scheduler).save_pretrained(folder)
    return folder


TABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
SIZES = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 64}


def stable_diffusion(folder: Path, *, consistency: bool = False) -> Path:
    """A text-to-image pipeline: CLIP text encoder, autoencoder of fold 2, conditional U-Net of two levels."""
    torch.manual_seed(0)
    parts = {
        "vae": _autoencoder(),
        "unet": _conditional(cross_attention_dim=16, time_cond_proj_dim=8 if consistency else None),
        "text_encoder": tf.CLIPTextModel(_text()),
        "tokenizer": _tokenizer(folder / "words"),
        "scheduler": (lib.LCMScheduler if consistency else lib.DDIMScheduler)(**TABLE, clip_sample=False),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    lib.StableDiffusionPipeline(**parts).save_pretrained(folder / "model")
    return folder / "model"


def stable_diffusion_xl(folder: Path, *, zeros: bool = True, **changes: Any) -> Path:
    """As `stable_diffusion`, with two text encoders and a U-Net conditioned on the pooled text and the image's size."""
    torch.manual_seed(0)
    words = _tokenizer(folder / "words")
    parts = {
        "vae": _autoencoder(),
        "unet": _conditional(**{"cross_attention_dim": 32, **SIZES, **changes}),
        "text_encoder": tf.CLIPTextModel(_text()),
        "text_encoder_2": tf.CLIPTextModelWithProjection(_text()),
        "tokenizer": words,
        "tokenizer_2": words,
        "scheduler": lib.EulerDiscreteScheduler(**TABLE),
    }
    pipe = lib.StableDiffusionXLPipeline(**parts, force_zeros_for_empty_prompt=zeros, add_watermarker=False)
    pipe.save_pretrained(folder / "model")
    return folder / "model"


def _autoencoder() -> Any:
    return lib.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )


def _conditional(**changes: Any) -> Any:
    return lib.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        **changes,
    )


def _text() -> Any:
    return tf.CLIPTextConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=300,
        projection_dim=16,
        bos_token_id=298,
        eos_token_id=299,
    )


def _tokenizer(folder: Path) -> Any:
    folder.mkdir(parents=True)
    words = {chr(c): i for i, c in enumerate(range(33, 127))}
    words |= {f"{w}</w>": len(words) + i for i, w in enumerate(list(words))}
    words |= {"<|startoftext|>": 298, "<|endoftext|>": 299}
    (folder / "vocab.json").write_text(json.dumps(words))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return tf.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)
