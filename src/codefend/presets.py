"""Named configs: a preset is a function that returns a dataclass, one line each. Imports no torch before that."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Preset:
    """A line of ``codefend list presets``; ``build`` lays ``key=value`` settings over the preset's config."""

    name: str
    summary: str
    make: Callable[[], Any]

    def build(self, settings: Mapping[str, str]) -> Any:
        """The config with the settings read as its fields' types. Raises UserError for a key or value it can't have."""
        from codefend.settings import override

        return override(self.make(), settings)


def _config(module: str, name: str, **values: Any) -> Callable[[], Any]:
    return lambda: getattr(import_module(f"codefend.{module}"), name)(**values)


# DiffPure at the t that loses the least with the shipped prior (LOG.md).
_DEFENSES = ("none", "jpeg", "bitdepth", "diffpure:t=0.05,steps=5", "bridge")

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset("pairs", "a bank of adversarial and clean pairs to train a bridge on", _config("pairs", "PairsConfig")),
        Preset(
            "own-pairs",
            "a bank made on a victim of your own, any white box: --set victim=hf:ID_OR_FOLDER",
            _config("pairs", "PairsConfig", encoders=("victim",), kinds=("features", "towards", "answers")),
        ),
        Preset("pocket", "train the pocket victim", _config("training.pocket", "PocketConfig")),
        Preset(
            "pocket-lite2",
            "train a second, different victim: another image encoder",
            _config("training.pocket", "PocketConfig", encoder="lite2"),
        ),
        Preset("prior", "train the unconditional diffusion prior", _config("training.prior", "PriorConfig")),
        Preset("bridge", "train the bridge from a bank of pairs", _config("training.bridge", "BridgeConfig")),
        Preset(
            "own-bridge",
            "train the bridge for a victim of your own, guided by its tokens and words: --set victim=hf:ID_OR_FOLDER",
            _config("training.bridge", "BridgeConfig", encoders=("victim",)),
        ),
        Preset(
            "hf-bridge",
            "fine-tune an unconditional diffusers model on pairs, as a bridge: --set model=ID_OR_FOLDER",
            _config("training.backbones", "HFBridgeConfig"),
        ),
        Preset(
            "latent",
            "fine-tune Stable Diffusion on pairs with LoRA, in latents (the paper's form): --set model=ID_OR_FOLDER",
            _config("training.backbones", "LatentConfig"),
        ),
        Preset(
            "quick",
            "evaluate in minutes: 16 images a task, 8/255, APGD-20, oblivious and adaptive",
            _config("evaluate", "EvalConfig", defenses=_DEFENSES, limit=16, steps=20, adaptive=("jpeg", "bridge")),
        ),
        Preset(
            "photographs",
            "held-out photographs under ImageNet encoders, seen and unseen: features, classes, dB; minutes",
            _config("evaluate.photographs", "PhotographsConfig"),
        ),
        Preset(
            "standard",
            "evaluate in an hour or two on 2 cores: 64 images a task, APGD-100 oblivious, adaptive on the bridge",
            _config("evaluate", "EvalConfig", defenses=_DEFENSES, limit=64, adaptive=("bridge",), adaptive_limit=24),
        ),
        Preset(
            "full",
            "evaluate for as long as it takes: all 512 images, 2, 4 and 8/255, every attack family",
            _config(
                "evaluate",
                "EvalConfig",
                defenses=_DEFENSES,
                attacks=("apgd", "apgd-targeted", "feature", "mifgsm", "square", "noise"),
                eps=(2.0, 4.0, 8.0),
            ),
        ),
    )
}
