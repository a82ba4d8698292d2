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
        """The config with the settings read as its fields' types. Raises CodefendError for a key or value it can't have."""
        from codefend.core.settings import override

        return override(self.make(), settings)


def _config(module: str, name: str, **values: Any) -> Callable[[], Any]:
    return lambda: getattr(import_module(module), name)(**values)


# DiffPure near its best t with the shipped prior (0.03, LOG.md), in few steps.
_DEFENSES = ("none", "jpeg", "bitdepth", "diffpure:t=0.05,steps=5", "bridge")

# Noise at one strength, in training as when it serves; most pairs mined through both, language-model loss among them.
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

# The shipped bridge's last training: batches replayed, at all the noise levels that it may serve with.
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

# The peers: module, class and summary; steps, batch and learning rate are the bridge's.
_PEERS: tuple[tuple[str, str, str, str], ...] = (
    ("hgd", "hgd", "HgdConfig", "static pairs, features kept"),
    ("flowpure", "flowpure", "FlowPureConfig", "static pairs, velocity field"),
    ("flowpure-gauss", "flowpure", "FlowPureGaussConfig", "noise only, velocity field"),
    ("adbm", "adbm", "AdbmConfig", "bridge at large noise, perturbations made in the loop"),
    ("codefend-r", "codefend_r", "CodefendRConfig", "static pairs, ADBM's shift, words aligned"),
)


# One switch each against "full", all for as many steps as a two-core machine does in a quarter of an hour or so.
_ABLATIONS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("full", "the reference", {}),
    ("static", "no pairs mined in the loop", {"mined": 0.0}),
    ("replay", "pairs replayed, each made harder by the step before, none mined", {"replay": 5}),
    ("no-features", "no feature loss", {"w_features": 0.0}),
    ("no-words", "no task loss", {"w_words": 0.0}),
    ("no-direction", "no directional loss", {"w_direction": 0.0}),
    ("no-noise", "no noise mixed in", {"max_sigma": 0.0}),
    ("one-encoder", "one encoder in bank, mining and guidance", {"encoders": ("lite0",), "without": ("lite2",)}),
    ("unseen-features", "no attack on features in bank and mining", {"without": ("features", "towards")}),
    ("unseen-language", "no attack on words and answers in bank and mining", {"without": ("words", "answers")}),
    ("scratch", "not from the prior", {"prior": "none"}),
)


def _ablation(name: str, summary: str, values: Mapping[str, Any]) -> Preset:
    return Preset(
        f"ablation-{name}",
        f"bridge, {summary}",
        _config("codefend.training.bridge", "BridgeConfig", steps=300, **values),
    )


def _peer(name: str, module: str, kind: str, summary: str) -> Preset:
    return Preset(name, f"train a peer: {summary}", _config(f"codefend.contrib.peers.{module}", kind))


# What `pairs` and the bridge's own mining lower: losses, words and features of the victim, by gradients.
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
            "a bank of adversarial and clean pairs to train a bridge on",
            _config("codefend.training.pairs", "PairsConfig"),
        ),
        Preset(
            "own-pairs",
            "a bank made on a victim of your own, any white box: --set victim=hf:ID_OR_FOLDER",
            _config(
                "codefend.training.pairs", "PairsConfig", encoders=("victim",), kinds=("features", "towards", "answers")
            ),
        ),
        Preset("pocket", "train the pocket victim", _config("codefend.training.pocket", "PocketConfig")),
        Preset(
            "pocket-lite2",
            "train a second, different victim: another image encoder",
            _config("codefend.training.pocket", "PocketConfig", encoder="lite2"),
        ),
        Preset("prior", "train the unconditional diffusion prior", _config("codefend.training.prior", "PriorConfig")),
        Preset("bridge", "train the bridge from a bank of pairs", _config("codefend.training.bridge", "BridgeConfig")),
        Preset(
            "bridge-robust",
            "train a bridge behind noise, against attackers who see it: --set prior=WEIGHTS to go on from a bridge",
            _config("codefend.training.bridge", "BridgeConfig", **_ROBUST),
        ),
        Preset(
            "bridge-replay",
            "the same by free adversarial training, for any noise up to 0.12: --set prior=WEIGHTS, a bridge's",
            _config("codefend.training.bridge", "BridgeConfig", **_REPLAY),
        ),
        Preset(
            "calibrate",
            "fit the detection score of trained weights on held-out pairs",
            _config("codefend.training.calibrate", "CalibrateConfig"),
        ),
        *(_peer(*peer) for peer in _PEERS),
        Preset(
            "fare",
            "train a peer: a pocket with an adversarially fine-tuned image encoder, a victim of its own",
            _config("codefend.contrib.fare", "FareConfig"),
        ),
        *(_ablation(name, summary, values) for name, summary, values in _ABLATIONS),
        Preset(
            "own-bridge",
            "train the bridge for a victim of your own, guided by its tokens and words: --set victim=hf:ID_OR_FOLDER",
            _config("codefend.training.bridge", "BridgeConfig", encoders=("victim",)),
        ),
        Preset(
            "hf-bridge",
            "fine-tune an unconditional diffusers model on pairs, as a bridge: --set model=ID_OR_FOLDER",
            _config("codefend.contrib.backbones.training", "HFBridgeConfig"),
        ),
        Preset(
            "latent",
            "fine-tune Stable Diffusion on pairs with LoRA, in latents (the paper's form): --set model=ID_OR_FOLDER",
            _config("codefend.contrib.backbones.training", "LatentConfig"),
        ),
        Preset(
            "quick",
            "evaluate in minutes: 16 images a task, 8/255, APGD-20, oblivious and adaptive",
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
            "held-out photographs under ImageNet encoders, seen and unseen: features, classes, dB; minutes",
            _config("codefend.bench", "PhotographsConfig"),
        ),
        Preset(
            "standard",
            "evaluate in some hours on 2 cores: 64 images a task, APGD-100 oblivious, adaptive on the bridge",
            _config(
                "codefend.bench",
                "EvalConfig",
                defenses=_DEFENSES,
                limit=64,
                adaptive=("bridge",),
                adaptive_limit=24,
                eot=12,
            ),
        ),
        Preset(
            "full",
            "evaluate for as long as it takes: all 512 images, 2, 4 and 8/255, every attack family and means",
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
            "oblivious attacks of the kinds the bridge was trained on against all others, 32 images a task",
            _config(
                "codefend.bench",
                "EvalConfig",
                defenses=_DEFENSES,
                attacks=(*_SEEN, *_UNSEEN),
                seen=_SEEN,
                threats=("T0",),
                limit=32,
            ),
        ),
        Preset(
            "transfer",
            "attacks made on each of --set crafters=A,B judged on all of them and on --set judges=openai:URL#model",
            _config(
                "codefend.bench",
                "TransferConfig",
                defenses=("none", "bridge"),
                attacks=("apgd", "mifgsm", "dim", "feature", "ssa-cwa:steps=50"),
                eps=(16.0,),
                limit=32,
            ),
        ),
    )
}
