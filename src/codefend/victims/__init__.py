"""Victims by name. Importing this module imports neither torch nor Transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from codefend.core.assets import asset
from codefend.core.registry import lookup

if TYPE_CHECKING:
    from codefend.types import Victim, WhiteBox


@dataclass(frozen=True)
class VictimSpec:
    """A line of ``codefend list victims`` and the function that loads it."""

    name: str
    summary: str
    build: Callable[[], Victim]


def _pocket(folder: Path) -> WhiteBox:
    from codefend.victims.pocket import load_pocket

    return load_pocket(folder)


def _smolvlm(folder: Path) -> WhiteBox:
    from codefend.victims.smolvlm_pocket import load_smolvlm

    return load_smolvlm(folder)


def _weights(folder: Path) -> WhiteBox:
    """The victim of a folder of trained weights."""
    from codefend.victims.smolvlm_pocket import is_weights

    return _smolvlm(folder) if is_weights(folder) else _pocket(folder)


def _openai(name: str) -> Victim:
    from codefend.victims.openai import OpenAIVictim

    return OpenAIVictim(name)


def _hf(name: str) -> WhiteBox:
    from codefend.victims import hf

    return hf.load(name)


def _encoder(name: str) -> Victim:
    from codefend.victims.encoder import load_encoder

    return load_encoder(name)


VICTIMS: dict[str, VictimSpec] = {
    "pocket": VictimSpec(
        "pocket",
        "SmolLM2-135M reading EfficientNet-Lite0 tokens; embedded, white-box, runs on two CPU cores",
        lambda: _pocket(asset("weights/pocket")),
    ),
    "smolvlm-pocket": VictimSpec(
        "smolvlm-pocket",
        "SmolVLM's architecture at pocket size: a ViT with 16-pixel patches and SmolLM2-135M; white-box",
        lambda: _smolvlm(asset("weights/smolvlm-pocket")),
    ),
    "openai:URL#model": VictimSpec(
        "openai:URL#model",
        "any OpenAI-compatible endpoint; black-box, with retries, a rate limit and a cache on disk",
        lambda: _openai("openai:"),
    ),
    "hf:ID_OR_FOLDER": VictimSpec(
        "hf:ID_OR_FOLDER",
        "any Transformers image-text-to-text model, white-box: LLaVA, Qwen-VL, SmolVLM, BLIP-2, Gemma, ...",
        lambda: _hf("hf:"),
    ),
    "encoder:NAME@SIDE": VictimSpec(
        "encoder:NAME@SIDE",
        "an ImageNet encoder that names its class: lite0, lite1 or lite2; @SIDE resizes the image first",
        lambda: _encoder("encoder:"),
    ),
}


def load(name: str) -> Victim:
    """Load the victim ``name``, the one whose weights lie in the folder ``name``, the endpoint ``openai:URL#model``,
    the Transformers model ``hf:ID_OR_FOLDER``, or the image encoder ``encoder:NAME@SIDE``.

    Raises CodefendError for an unknown name (the nearest are named), a folder without weights, or a missing package.

    >>> import torch
    >>> from codefend import load_victim
    >>> encoder = load_victim("encoder:lite0@64")  # "pocket" is a whole multimodal LLM
    >>> len(encoder.generate(torch.rand(2, 3, 64, 64), ["What is this?"] * 2))
    2
    """
    if name.startswith("openai:") and name not in VICTIMS:
        return _openai(name)
    if name.startswith("hf:") and name not in VICTIMS:
        return _hf(name)
    if name.startswith("encoder:") and name not in VICTIMS:
        return _encoder(name)
    if name not in VICTIMS and (Path(name).is_dir() or "/" in name):
        return _weights(Path(name))
    return lookup("victim", name, VICTIMS).build()


def load_white_box(name: str) -> WhiteBox:
    """As ``load``, where gradients are needed. Also raises CodefendError for a victim that only answers text."""
    from codefend.types import CodefendError, WhiteBox

    victim = load(name)
    if not isinstance(victim, WhiteBox):
        raise CodefendError(
            f"victim {victim.name!r} only answers text, and this needs its gradient; use another victim"
        )
    return victim
