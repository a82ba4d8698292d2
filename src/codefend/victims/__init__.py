"""Victims by name. Importing this module imports neither torch nor Transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING

from codefend.core.assets import asset
from codefend.core.specs import lookup

if TYPE_CHECKING:
    from codefend.types import Victim, WhiteBox


@dataclass(frozen=True)
class VictimSpec:
    """A line of ``codefend list victims`` and the function that loads it."""

    name: str
    summary: str
    build: Callable[[], Victim]


POCKET, SMOLVLM = "codefend.victims.pocket:load_pocket", "codefend.victims.smolvlm_pocket:load_smolvlm"
PREFIXES = {  # of names that are given whole to a loader
    "openai:": "codefend.victims.openai:OpenAIVictim",
    "hf:": "codefend.victims.hf:load",
    "encoder:": "codefend.victims.encoder:load_encoder",
}


def _shipped(place: str, name: str, *parts: str, summary: str) -> VictimSpec:
    """A victim with the installed weights ``name``, and of ``parts`` of it in folders of their own."""
    return VictimSpec(
        name, summary, lambda: resolve_name(place)(*(asset(f"weights/{part}") for part in (name, *parts)))
    )


def _prefix(prefix: str, rest: str, summary: str) -> VictimSpec:
    """The row of a prefix; loaded by this very name, it says what is missing."""
    return VictimSpec(f"{prefix}{rest}", summary, lambda: resolve_name(PREFIXES[prefix])(prefix))


VICTIMS: dict[str, VictimSpec] = {
    spec.name: spec
    for spec in (
        _shipped(
            POCKET,
            "pocket",
            "pocket-photographs",
            summary="SmolLM2-135M reading EfficientNet-Lite0 tokens; embedded, white-box, runs on two CPU cores",
        ),
        _shipped(
            SMOLVLM,
            "smolvlm-pocket",
            summary="SmolVLM's architecture at pocket size: a ViT with 16-pixel patches and SmolLM2-135M; white-box",
        ),
        _prefix(
            "openai:",
            "URL#model",
            "any OpenAI-compatible endpoint; black-box, with retries, a rate limit and a cache on disk",
        ),
        _prefix(
            "hf:",
            "ID_OR_FOLDER",
            "any Transformers image-text-to-text model, white-box: LLaVA, Qwen-VL, SmolVLM, BLIP-2, Gemma, ...",
        ),
        _prefix(
            "encoder:",
            "NAME@SIDE",
            "an ImageNet encoder that names its class: lite0, lite1 or lite2; @SIDE resizes the image first",
        ),
    )
}


def _weights(folder: Path) -> WhiteBox:
    """The victim of a folder of trained weights."""
    from codefend.victims.smolvlm_pocket import is_weights

    victim: WhiteBox = resolve_name(SMOLVLM if is_weights(folder) else POCKET)(folder)
    return victim


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
    prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
    if prefix and name not in VICTIMS:
        victim: Victim = resolve_name(PREFIXES[prefix])(name)
        return victim
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
