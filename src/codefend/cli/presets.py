"""Presets: named configs of `pairs`, `train` and `eval`. Importing this module imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Preset:
    """A named config. ``build`` applies ``key=value`` settings to it."""

    name: str
    summary: str
    make: Callable[[], Any]

    def build(self, settings: Mapping[str, str]) -> Any:
        """The config with ``settings`` applied. Raises CodefendError for an unknown key or an invalid value."""
        from codefend.core.settings import override

        return override(self.make(), settings)


def _config(module: str, name: str, **values: Any) -> Callable[[], Any]:
    return lambda: getattr(import_module(module), name)(**values)


# DiffPure near its best t with the shipped prior (0.03, docs/notebook/2026-11.md), in few steps.
_DEFENSES = ("none", "jpeg", "bitdepth", "diffpure:t=0.05,steps=5", "bridge")

# Noise of one level, in training and serving; most pairs are mined in the loop, partly on the language-model loss.
_ROBUST: dict[str, Any] = {
    "noise_free": 0.0,
    "min_sigma": 0.1,
    "max_sigma": 0.1,
    "sigma": 0.1,
    "clean": 0.1,
    "at_one": 0.9,
    "mined": 0.6,
    "lean": True,
    "max_eps": 10 / 255,
    "eps_ramp": 150,
    "answers": 0.35,
    "w_answers": 0.4,
    "w_words": 0.8,
    "steps": 1000,
    "lr": 6e-4,
}

# The last training of the shipped bridge: replayed batches, at all noise levels that it serves with.
_REPLAY: dict[str, Any] = {
    "replay": 5,
    "mined": 0.5,
    "answers": 0.25,
    "max_eps": 8 / 255,
    "noise_free": 0.2,
    "min_sigma": 0.03,
    "max_sigma": 0.12,
    "sigma": 0.05,
    "at_one": 0.95,
    "clean": 0.125,
    "w_identity": 8.0,
    "w_features": 1.2,
    "w_words": 0.8,
    "w_answers": 0.4,
    "steps": 2200,
    "lr": 6e-4,
    "warmup": 30,
    "save_every": 100,
}

# The peers: name, module, config and summary; steps, batch and learning rate equal the bridge's.
_PEERS: tuple[tuple[str, str, str, str], ...] = (
    ("hgd", "hgd", "HgdConfig", "static pairs, feature loss"),
    ("flowpure", "flowpure", "FlowPureConfig", "static pairs, velocity field"),
    ("flowpure-gauss", "flowpure", "FlowPureGaussConfig", "noise only, velocity field"),
    ("adbm", "adbm", "AdbmConfig", "bridge at large noise, perturbations mined in the loop"),
    ("codefend-r", "codefend_r", "CodefendRConfig", "static pairs, shift as in ADBM, word alignment loss"),
)


# Each differs from "full" in one setting; all train for about 15 minutes on two cores.
_ABLATIONS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("full", "the reference", {}),
    ("static", "without in-loop mining", {"mined": 0.0}),
    ("replay", "replayed pairs instead of in-loop mining", {"replay": 5}),
    ("no-features", "without the feature loss", {"w_features": 0.0}),
    ("no-words", "without the word loss", {"w_words": 0.0}),
    ("no-direction", "without the directional loss", {"w_direction": 0.0}),
    ("no-noise", "without noise", {"max_sigma": 0.0}),
    ("one-encoder", "one encoder in bank, mining and guidance", {"encoders": ("lite0",), "without": ("lite2",)}),
    ("unseen-features", "without feature attacks in bank and mining", {"without": ("features", "towards")}),
    ("unseen-language", "without word and answer attacks in bank and mining", {"without": ("words", "answers")}),
    ("scratch", "from random weights instead of the prior", {"prior": "none"}),
)


def _ablation(name: str, summary: str, values: Mapping[str, Any]) -> Preset:
    return Preset(
        f"ablation-{name}",
        f"bridge, {summary}",
        _config("codefend.training.bridge", "BridgeConfig", steps=300, **values),
    )


def _peer(name: str, module: str, kind: str, summary: str) -> Preset:
    return Preset(name, f"train a peer: {summary}", _config(f"codefend.contrib.peers.{module}", kind))


# Attacks on the same losses as `pairs` and in-loop mining: loss, words and features of the victim, by gradient.
_SEEN = ("pgd", "apgd", "apgd-targeted", "feature", "feature-target")
_UNSEEN = (
    *("apgd-margin", "cw", "mifgsm", "dim", "ssa-cwa:steps=50", "pureproof:steps=30"),
    *("square:steps=1000", "universal", "patch", "stadv", "perc-al"),
)
_ADAPTIVE = ("apgd:bpda=true", "apgd:process=1", "apgd:evade=10")
_TEXT = ("characters", "glyphs", "words", "planted", "injection", "typographic", "joint", "joint-targeted")

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            "pairs",
            "generate a bank of adversarial and clean pairs for training",
            _config("codefend.training.pairs", "PairsConfig"),
        ),
        Preset(
            "own-pairs",
            "generate a bank on a white-box victim of yours: --set victim=hf:ID_OR_FOLDER",
            _config(
                "codefend.training.pairs", "PairsConfig", encoders=("victim",), kinds=("features", "towards", "answers")
            ),
        ),
        Preset("pocket", "train the pocket victim", _config("codefend.training.pocket", "PocketConfig")),
        Preset(
            "pocket-lite2",
            "train a second pocket victim with another image encoder",
            _config("codefend.training.pocket", "PocketConfig", encoder="lite2"),
        ),
        Preset(
            "smolvlm-pocket",
            "train a second victim with SmolVLM's architecture: vision transformer, connector, adapters",
            _config("codefend.training.smolvlm_pocket", "SmolVLMConfig"),
        ),
        Preset("prior", "train the unconditional diffusion prior", _config("codefend.training.prior", "PriorConfig")),
        Preset("bridge", "train the bridge from a bank of pairs", _config("codefend.training.bridge", "BridgeConfig")),
        Preset(
            "encoder",
            "distil a small image encoder of another family, to attack and guide by: --set family=vit16",
            _config("codefend.training.encoder", "EncoderConfig"),
        ),
        Preset(
            "robust",
            "train a bridge for any noise level, single-step adversarial, through encoders of several families",
            _config("codefend.training.robust", "RobustConfig"),
        ),
        Preset(
            "bridge-robust",
            "train a bridge behind noise against adaptive attacks; --set prior=WEIGHTS continues from a bridge",
            _config("codefend.training.bridge", "BridgeConfig", **_ROBUST),
        ),
        Preset(
            "bridge-replay",
            "free adversarial training for any noise up to 0.12; --set prior=WEIGHTS, those of a bridge",
            _config("codefend.training.bridge", "BridgeConfig", **_REPLAY),
        ),
        Preset(
            "calibrate",
            "fit the detection score of weights on held-out pairs",
            _config("codefend.training.calibrate", "CalibrateConfig"),
        ),
        *(_peer(*peer) for peer in _PEERS),
        Preset(
            "fare",
            "train a peer: the pocket with an adversarially fine-tuned image encoder; the result is a victim",
            _config("codefend.contrib.fare", "FareConfig"),
        ),
        *(_ablation(name, summary, values) for name, summary, values in _ABLATIONS),
        Preset(
            "own-bridge",
            "train a bridge for a victim of yours, guided by its features and words: --set victim=hf:ID_OR_FOLDER",
            _config("codefend.training.bridge", "BridgeConfig", encoders=("victim",)),
        ),
        Preset(
            "hf-bridge",
            "fine-tune an unconditional diffusers model as a bridge: --set model=ID_OR_FOLDER",
            _config("codefend.contrib.backbones.training", "HFBridgeConfig"),
        ),
        Preset(
            "latent",
            "fine-tune Stable Diffusion with LoRA in latent space, as the paper does: --set model=ID_OR_FOLDER",
            _config("codefend.contrib.backbones.training", "LatentConfig"),
        ),
        Preset(
            "quick",
            "minutes: 16 images per task, 8/255, APGD-20, oblivious and adaptive",
            _config(
                "codefend.bench",
                "EvalConfig",
                defenses=_DEFENSES,
                limit=16,
                steps=20,
                adaptive=("jpeg", "bridge"),
                eot=3,
            ),
        ),
        Preset(
            "photographs",
            "minutes: held-out photographs judged by ImageNet encoders: features, classes, PSNR",
            _config("codefend.bench", "PhotographsConfig"),
        ),
        Preset(
            "standard",
            "hours on two cores: 64 images per task, APGD-100 oblivious, adaptive on the bridge",
            _config(
                "codefend.bench",
                "EvalConfig",
                defenses=_DEFENSES,
                limit=64,
                adaptive=("bridge",),
                adaptive_limit=24,
                eot=12,
                sample="strata",
            ),
        ),
        Preset(
            "full",
            "days: all 512 images, 2, 4 and 8/255, every attack family, every adaptive option",
            _config(
                "codefend.bench",
                "EvalConfig",
                defenses=_DEFENSES,
                attacks=(*_SEEN, *_UNSEEN, "corruption", "noise", *_ADAPTIVE, *_TEXT),
                eps=(2.0, 4.0, 8.0),
                eot=20,
                resubmissions=10,
                threats=("T0", "T2", "T2d"),
            ),
        ),
        Preset(
            "seen-unseen",
            "attack families seen in training against unseen ones, oblivious, 32 images per task",
            _config(
                "codefend.bench",
                "EvalConfig",
                defenses=_DEFENSES,
                attacks=(*_SEEN, *_UNSEEN),
                seen=_SEEN,
                threats=("T0",),
                limit=32,
                sample="strata",
            ),
        ),
        Preset(
            "transfer",
            "transfer: attacks crafted on --set crafters=A,B, judged on these and --set judges=openai:URL#MODEL",
            _config(
                "codefend.bench",
                "TransferConfig",
                defenses=("none", "bridge"),
                attacks=("apgd", "mifgsm", "dim", "feature", "ssa-cwa:steps=50"),
                eps=(16.0,),
                limit=32,
                sample="strata",
            ),
        ),
    )
}
