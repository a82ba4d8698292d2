"""Presets: named configs of `pairs`, `train` and `eval`. Importing this module imports no torch.

One-off settings are files for ``--config``: see ``recipes/``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from codefend.core.compat import OLD_ABLATION, OLD_PRESETS
from codefend.core.settings import override, read_settings
from codefend.core.specs import lookup, parse_options
from codefend.types import CodefendError


@dataclass(frozen=True)
class Preset:
    """A named config: ``kind`` is ``module:Class``, ``values`` are arguments of the class."""

    summary: str
    kind: str
    values: Mapping[str, Any] = field(default_factory=dict)
    changes: Mapping[str, str] = field(default_factory=dict)  # as text, applied before the user's

    def build(self, settings: Mapping[str, str]) -> Any:
        """The config with ``settings`` applied. Raises CodefendError for an unknown key or an invalid value.

        Where ``settings`` names other defenses, those of the preset's ``adaptive`` that are not among them go.
        """
        config = override(resolve_name(self.kind)(**self.values), {**self.changes, **settings})
        if "adaptive" in self.values and "defenses" in settings and "adaptive" not in settings:
            config = replace(config, adaptive=tuple(name for name in config.adaptive if name in config.defenses))
        return config


_PAIRS, _BRIDGE = "codefend.training.pairs:PairsConfig", "codefend.training.bridge:BridgeConfig"
_EVAL = "codefend.bench:EvalConfig"

# Peers: steps, batch and learning rate equal the bridge's.
_TRAININGS = {
    "pairs": Preset("generate a bank of adversarial and clean pairs for training", _PAIRS),
    "own-pairs": Preset(
        "generate a bank on a white-box victim of yours: --set victim=hf:ID_OR_FOLDER",
        _PAIRS,
        {"encoders": ("victim",), "kinds": ("features", "towards", "answers")},
    ),
    "pocket": Preset("train the pocket victim", "codefend.training.pocket:PocketConfig"),
    "smolvlm-pocket": Preset(
        "train a second victim with SmolVLM's architecture: vision transformer, connector, adapters",
        "codefend.training.smolvlm_pocket:SmolVLMConfig",
    ),
    "pocket-photographs": Preset(
        "train the part of the pocket that answers about photographs",
        "codefend.training.pocket_photographs:PhotographConfig",
    ),
    "prior": Preset("train the unconditional diffusion prior", "codefend.training.prior:PriorConfig"),
    "bridge": Preset("train the bridge from a bank of pairs", _BRIDGE),
    "encoder": Preset(
        "distil a small image encoder of another family, to attack and guide by: --set family=vit16",
        "codefend.training.encoder:EncoderConfig",
    ),
    "robust": Preset(
        "train a bridge for any noise level, single-step adversarial, through encoders of several families",
        "codefend.training.robust:RobustConfig",
    ),
    "calibrate": Preset(
        "fit the detection score of weights on held-out pairs", "codefend.training.calibrate:CalibrateConfig"
    ),
    "hgd": Preset("train a peer: static pairs, feature loss", "codefend.contrib.peers.hgd:HgdConfig"),
    "flowpure": Preset("train a peer: static pairs, velocity field", "codefend.contrib.peers.flowpure:FlowPureConfig"),
    "flowpure-gauss": Preset(
        "train a peer: noise only, velocity field", "codefend.contrib.peers.flowpure:FlowPureGaussConfig"
    ),
    "adbm": Preset(
        "train a peer: bridge at large noise, perturbations mined in the loop", "codefend.contrib.peers.adbm:AdbmConfig"
    ),
    "codefend-r": Preset(
        "train a peer: static pairs, shift as in ADBM, word alignment loss",
        "codefend.contrib.peers.codefend_r:CodefendRConfig",
    ),
    "fare": Preset(
        "train a peer: the pocket with an adversarially fine-tuned image encoder; the result is a victim",
        "codefend.contrib.fare:FareConfig",
    ),
    "tecoa": Preset(
        "train a peer: as fare, with the words of the vision tokens as labels (TeCoA-style); the result is a victim",
        "codefend.contrib.fare:TecoaConfig",
    ),
    "own-bridge": Preset(
        "train a bridge for a victim of yours, guided by its features and words: --set victim=hf:ID_OR_FOLDER",
        _BRIDGE,
        {"encoders": ("victim",)},
    ),
    "hf-bridge": Preset(
        "fine-tune an unconditional diffusers model as a bridge: --set model=ID_OR_FOLDER",
        "codefend.contrib.backbones.training:HFBridgeConfig",
    ),
    "latent": Preset(
        "fine-tune Stable Diffusion with LoRA in latent space, as the paper does: --set model=ID_OR_FOLDER",
        "codefend.contrib.backbones.training:LatentConfig",
    ),
}

# DiffPure near its best t with the shipped prior (0.03, docs/notebook/2026-11.md), in few steps.
_DEFENSES = ("none", "jpeg", "bitdepth", "diffpure:t=0.05,steps=5", "bridge")
# Attacks on the same losses as `pairs` and in-loop mining: loss, words and features of the victim, by gradient.
_SEEN = ("pgd", "apgd", "apgd-targeted", "feature", "feature-target")
_UNSEEN = (
    *("apgd-margin", "cw", "mifgsm", "dim", "ssa-cwa:steps=50", "pureproof:steps=30"),
    *("square:steps=1000", "universal", "patch", "stadv", "perc-al"),
)
_ADAPTIVE = ("apgd:bpda=true", "apgd:process=1", "apgd:evade=10")
_TEXT = ("characters", "glyphs", "words", "planted", "injection", "typographic", "joint", "joint-targeted")
_HEADLINE = ("none", "jpeg", "diffpure:t=0.05,steps=5", "bridge:sigma=0.02", "bridge", "bridge:sigma=0.1")
_OWN = ("pgd", "mifgsm", "apgd", "apgd-margin", "pgd-decay", "robustvlm")  # with the counterparts of the next line
_OUTSIDE = ("foolbox-pgd", "foolbox-adam-pgd", "foolbox-mifgsm", "art-pgd", "art-apgd", "art-autoattack")
_STRATA: dict[str, Any] = {"limit": 32, "sample": "strata"}

_EVALUATIONS = {
    "quick": Preset(
        "minutes: 16 images per task, 8/255, APGD-20, oblivious and adaptive",
        _EVAL,
        {"defenses": _DEFENSES, "limit": 16, "steps": 20, "adaptive": ("jpeg", "bridge"), "eot": 3},
    ),
    "photographs": Preset(
        "minutes: held-out photographs judged by ImageNet encoders: features, classes, PSNR",
        "codefend.bench:PhotographsConfig",
    ),
    "standard": Preset(
        "hours on two cores: 64 images per task, APGD-100 oblivious, adaptive on the bridge",
        _EVAL,
        {"defenses": _DEFENSES, "adaptive": ("bridge",), "adaptive_limit": 24, "eot": 12, **_STRATA, "limit": 64},
    ),
    "full": Preset(
        "days: all 512 images, 2, 4 and 8/255, every attack family, every adaptive option",
        _EVAL,
        {
            "defenses": _DEFENSES,
            "attacks": (*_SEEN, *_UNSEEN, "corruption", "noise", *_ADAPTIVE, *_TEXT),
            "eps": (2.0, 4.0, 8.0),
            "eot": 20,
            "resubmissions": 10,
            "threats": ("T0", "T2", "T2d"),
        },
    ),
    "seen-unseen": Preset(
        "attack families seen in training against unseen ones, oblivious, 32 images per task",
        _EVAL,
        {"defenses": _DEFENSES, "attacks": (*_SEEN, *_UNSEEN), "seen": _SEEN, "threats": ("T0",), **_STRATA},
    ),
    "headline": Preset(
        "days on two cores, in chunks: 128 images per task oblivious, 64 adaptive, three seeds of noise and attack",
        "codefend.bench:SeedsConfig",
        {
            "defenses": _HEADLINE,
            "adaptive": _HEADLINE[2:],
            "attacks": ("apgd", "pgd-decay", "word-head"),
            "eps": (2.0, 4.0, 8.0),
            "steps": 60,
            "eot": 8,
            "resubmissions": 3,
            "adaptive_limit": 64,
            "limit": 128,
            "sample": "strata",
        },
    ),
    "outside": Preset(
        "attacks of other libraries and ours, with equal steps; needs the extra `outside`",
        _EVAL,
        {
            "defenses": ("none", "bridge", "bridge:sigma=0.1"),
            "adaptive": ("bridge", "bridge:sigma=0.1"),
            "attacks": (*_OWN, *_OUTSIDE),
            "steps": 60,
            "eot": 4,
            "resubmissions": 3,
            **_STRATA,
            "limit": 16,
        },
    ),
    "certify": Preset(
        "certificates of 64 questions at two noise levels, 1,000 draws each: `codefend certify`",
        "codefend.bench.certify:CertifyConfig",
    ),
    "transfer": Preset(
        "transfer: attacks crafted on --set crafters=A,B, judged on these and --set judges=openai:URL#MODEL",
        "codefend.bench:TransferConfig",
        {
            "defenses": ("none", "bridge"),
            "attacks": ("apgd", "mifgsm", "dim", "feature", "ssa-cwa:steps=50"),
            "eps": (16.0,),
            **_STRATA,
        },
    ),
}

_OLD = {
    name: Preset(f"old name of {old.current}", _TRAININGS[old.preset].kind, changes=old.settings)
    for name, old in OLD_PRESETS.items()
}

PRESETS: dict[str, Preset] = {**_TRAININGS, **_EVALUATIONS, **_OLD}


def preset_config(name: str, items: Sequence[str], kind: type | None = None, *, file: Path | None = None) -> Any:
    """Build the config of preset ``name`` with the settings of ``file`` and ``key=value`` overrides.

    Raises CodefendError for an unknown preset or key (the nearest is named), for a preset of another verb, and for a
    file that cannot be read.
    """
    if name.startswith(OLD_ABLATION):
        raise CodefendError(
            f"write bridge --config recipes/ablations/{name.removeprefix(OLD_ABLATION)}.toml for {name}"
        )
    preset = lookup("preset", name, PRESETS)
    settings = {**(read_settings(file) if file else {}), **parse_options(items)}
    if kind is not None and not issubclass(resolve_name(preset.kind), kind):
        raise CodefendError(f"preset {name!r} belongs to another verb; see `codefend list presets`")
    return preset.build(settings)
