"""Purifiers by name or folder. Importing this module imports neither torch nor any purifier."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from codefend.core.assets import asset
from codefend.core.settings import check_keys, override
from codefend.core.specs import Spec, lookup, parse_spec
from codefend.types import CodefendError

if TYPE_CHECKING:
    from codefend.purifiers.base import NetPurifier, Purifier
    from codefend.purifiers.nets import PurifierNet

log = logging.getLogger("codefend")

Build = Callable[[Mapping[str, object]], "Purifier"]
BuildNamed = Callable[[str, Mapping[str, object]], "Purifier"]


@dataclass(frozen=True)
class PurifierSpec:
    """One entry of the registry. ``build`` takes options as text or typed, and raises CodefendError for wrong ones."""

    name: str
    summary: str
    source: str
    build: Build


def load(name_or_folder: str | Path, **options: Any) -> Purifier:
    """Load ``"bridge"``, ``"jpeg:quality=75"``, ``"diffpure:t=0.15,steps=15"`` or a folder of trained weights.

    ``"hub:ID_OR_FOLDER"`` loads from the Hugging Face Hub, ``"hf-diffpure:ID_OR_FOLDER:t=0.1"`` and the other prefixes
    load models of `diffusers`. The purifier is in eval mode on the CPU, its weights frozen. ``options`` override those
    in the name. A former name loads what replaced it, with a warning. Raises CodefendError for an unknown name and
    option and for an unreadable folder.

    >>> from codefend import load_purifier
    >>> load_purifier("jpeg", quality=50)
    Jpeg(jpeg:quality=50)
    """
    spec = parse_spec(str(name_or_folder), names={*PURIFIERS, *FORMER})
    if spec.prompt or spec.votes > 1:
        raise CodefendError(f"{name_or_folder}: +prompt and +votes belong to a defense; serve has --prompt and --votes")
    current = spec if isinstance(name_or_folder, Path) else current_spec(spec.name)
    name, settings = current.name, {**current.options, **spec.options, **options}
    prefix, colon, _ = name.partition(":")
    if colon and name not in PURIFIERS and prefix in PREFIXES:
        return PREFIXES[prefix](name, settings).eval()
    is_path = name not in PURIFIERS and ("/" in name or "\\" in name or Path(name).is_dir())
    if isinstance(name_or_folder, Path) or is_path:
        return load_folder(Path(name), settings)
    return lookup("purifier", name, PURIFIERS).build(settings).eval()


def current_spec(name: str) -> Spec:
    """``name``, or what replaced that purifier: then logs a warning that says so."""
    if name not in FORMER:
        return Spec(name)
    log.warning("purifier %s was replaced by %s, which is loaded", name, FORMER[name])
    return parse_spec(FORMER[name])


def load_folder(folder: Path, settings: Mapping[str, object], *, name: str | None = None) -> Purifier:
    """The purifier in ``folder``, called ``name`` or as the folder. Raises CodefendError as `load`."""
    from codefend.purifiers.nets import load_net

    if not folder.is_dir():
        raise CodefendError(f"no such purifier folder: {folder}")
    for file, prefix in MARKS.items():
        if (folder / file).is_file():
            return PREFIXES[prefix](f"{prefix}:{folder}", settings).eval()
    return build_net_purifier(*load_net(folder), settings, name=name or folder.resolve().name)


def build_net_purifier(
    net: PurifierNet, meta: Mapping[str, Any], settings: Mapping[str, object], *, name: str
) -> NetPurifier:
    """The purifier of ``meta`` (kind, options, detector) around ``net``, which is frozen.

    Raises CodefendError for an unknown kind or option, and for a gate without a detector.
    """
    from codefend.purifiers.detection import Detector

    kind = meta.get("kind")
    if kind not in KINDS:
        raise CodefendError(f"{name} holds a network of unknown kind {kind!r}; known: {', '.join(KINDS)}")
    place, fallback = KINDS[kind]
    cls: type[NetPurifier] = resolve_name(place)
    detector = Detector.from_dict(meta["detector"]) if meta.get("detector") else None
    saved = {**fallback, **meta.get("options", {})}
    check_keys(cls.options_class, saved)
    defaults = cls.options_class(**saved)
    options = override(defaults, settings) if settings else defaults
    net.requires_grad_(False)  # attacks differentiate in the images; a training builds its purifier itself
    return cls(net, options, name=name, defaults=defaults, kind=kind, detector=detector).eval()


def _named(place: str) -> BuildNamed:
    def build(name: str, settings: Mapping[str, object]) -> Purifier:
        purifier: Purifier = resolve_name(place)(name, settings)
        return purifier

    return build


def _plain(place: str) -> Build:
    def build(settings: Mapping[str, object]) -> Purifier:
        cls: type[Purifier] = resolve_name(place)
        if cls.options_class is None and settings:
            raise CodefendError(f"purifier {cls.name!r} has no options")
        return cls() if cls.options_class is None else cls(override(cls.options_class(), settings))

    return build


def _shipped(weights: str, name: str = "") -> Build:
    name = name or weights

    def build(settings: Mapping[str, object]) -> Purifier:
        from codefend.purifiers.nets import load_net

        return build_net_purifier(*load_net(asset(f"weights/{weights}")), settings, name=name)

    return build


# The class of each kind of weights, and its options where neither the folder nor the user sets them.
KINDS: dict[str, tuple[str, dict[str, object]]] = {
    "prior": ("codefend.purifiers.diffpure:DiffPure", {}),
    "bridge": ("codefend.purifiers.bridge:Bridge", {}),
    "hgd": ("codefend.contrib.peers.hgd:Hgd", {}),
    "flowpure": ("codefend.contrib.peers.flowpure:FlowPure", {}),
    "flowpure-gauss": ("codefend.contrib.peers.flowpure:FlowPure", {"start": 0.5, "noise": 0.3}),
    # DiffPure with DDIM steps from their papers' times, on a network trained in another way.
    "adbm": ("codefend.purifiers.diffpure:DiffPure", {"t": 0.1, "steps": 5, "eta": 0.0}),
    "codefend-r": ("codefend.purifiers.diffpure:DiffPure", {"t": 0.15, "steps": 10, "eta": 0.0}),
}
PREFIXES: dict[str, BuildNamed] = {  # before a colon and a model's id or folder
    "hf-diffpure": _named("codefend.contrib.backbones.pixels:build_diffpure"),
    "hf-bridge": _named("codefend.contrib.backbones.pixels:build_bridge"),
    "hf-latent": _named("codefend.contrib.backbones.latent:build_latent"),
    "hub": _named("codefend.purifiers.hub:build_hub"),
}
MARKS = {"adapters.safetensors": "hf-latent", "model_index.json": "hf-bridge"}  # a file of such a folder -> its prefix


def _prefix(prefix: str, summary: str, source: str) -> PurifierSpec:
    """The row of a prefix in `PURIFIERS`; loaded by this very name, it says that the id is missing."""
    return PurifierSpec(f"{prefix}:ID_OR_FOLDER", summary, source, lambda settings: PREFIXES[prefix]("", settings))


_ROWS = (
    PurifierSpec(
        "identity", "no defense: returns the image unchanged", "", _plain("codefend.purifiers.shallow:Identity")
    ),
    PurifierSpec(
        "jpeg",
        "JPEG compression (quality)",
        "Das et al. 2018, arXiv 1802.06816",
        _plain("codefend.purifiers.shallow:Jpeg"),
    ),
    PurifierSpec(
        "bitdepth",
        "fewer bits per colour, then a median filter (bits, median)",
        "Xu et al. 2018, arXiv 1704.01155",
        _plain("codefend.purifiers.shallow:BitDepth"),
    ),
    PurifierSpec(
        "median",
        "median filter (size)",
        "Xu et al. 2018, arXiv 1704.01155",
        _plain("codefend.purifiers.shallow:Median"),
    ),
    PurifierSpec(
        "redact",
        "text filled from its surroundings: what reads like an instruction, or scope=all; needs the `ocr` extra",
        "recognition by RapidOCR, Apache-2.0",
        _plain("codefend.purifiers.redact:Redact"),
    ),
    PurifierSpec("blur", "Gaussian blur (sigma)", "", _plain("codefend.purifiers.shallow:Blur")),
    PurifierSpec(
        "area",
        "against image-scaling attacks: means over the model's own pixels, in the image's size (side, gate)",
        "after Quiring et al., USENIX Security 2020",
        _plain("codefend.purifiers.rescale:Area"),
    ),
    PurifierSpec(
        "scaling-median",
        "the same by medians, of those pixels alone that decide what a model that shrinks images sees (side, gate)",
        "Quiring et al., USENIX Security 2020",
        _plain("codefend.purifiers.rescale:ScalingMedian"),
    ),
    PurifierSpec(
        "diffpure",
        "noise to time t, then denoising steps with an unconditional prior (t, steps, eta)",
        "Nie et al. 2022, arXiv 2205.07460",
        _shipped("prior", "diffpure"),
    ),
    PurifierSpec(
        "oidn",
        "noise, then Intel's Open Image Denoise network (sigma); needs the `oidn` extra",
        "https://github.com/RenderKit/oidn, Apache-2.0",
        _plain("codefend.contrib.oidn:Oidn"),
    ),
    PurifierSpec(
        "bridge",
        "supervised diffusion bridge, adversarial to clean, noised (sigma, strength, evaluations, guided, gate)",
        "CoDefend; bridge after arXiv 2302.05872, 2408.00315, 2505.13280; noise after 1902.02918, 1906.04584; "
        "training after N-FGSM, arXiv 2202.01181",
        _shipped("bridge"),
    ),
    PurifierSpec(
        "bridge-large",
        "the bridge in a network three times as large, for a GPU",
        "CoDefend; as bridge",
        _shipped("bridge-large"),
    ),
    PurifierSpec(
        "bridge-detail",
        "the bridge without noise: keeps the detail of photographs, against oblivious attacks of known kinds",
        "CoDefend; as bridge",
        _shipped("bridge-detail"),
    ),
    PurifierSpec(
        "hgd",
        "peer: one residual evaluation, trained on static pairs to preserve a model's features",
        "HGD, Liao et al. 2018, arXiv 1712.02976",
        _shipped("hgd"),
    ),
    PurifierSpec(
        "flowpure",
        "peer: Euler steps along a flow from static attacks to clean (steps)",
        "FlowPure-PGD, Collaert et al. 2025, arXiv 2505.13280",
        _shipped("flowpure"),
    ),
    PurifierSpec(
        "flowpure-gauss",
        "peer: noise, then Euler steps along a flow from noise to clean (steps, start, noise)",
        "FlowPure-Gauss, Collaert et al. 2025, arXiv 2505.13280",
        _shipped("flowpure-gauss"),
    ),
    PurifierSpec(
        "adbm",
        "peer: noise, then DDIM steps of a bridge trained on in-loop perturbations (t, steps)",
        "ADBM, Li et al. 2025, arXiv 2408.00315",
        _shipped("adbm"),
    ),
    PurifierSpec(
        "codefend-r",
        "peer: noise, then DDIM steps of a network trained on static pairs, directionally (t, steps)",
        "our reconstruction, in pixels, of CoDefend, Zhu et al. 2025, arXiv 2510.11096",
        _shipped("codefend-r"),
    ),
    _prefix(
        "hf-diffpure",
        "DiffPure with an unconditional pixel model of diffusers (t, steps, eta)",
        "Nie et al. 2022, arXiv 2205.07460",
    ),
    _prefix(
        "hf-bridge",
        "such a model as a bridge; fine-tune it first, `codefend train hf-bridge` (evaluations, sigma)",
        "CoDefend",
    ),
    _prefix(
        "hf-latent",
        "Stable Diffusion in latents (t, steps, eta, consistency); t=0 is its autoencoder alone",
        "CoDefend, arXiv 2510.11096; OSCP, arXiv 2408.17064",
    ),
    _prefix("hub", "weights of this project from the Hugging Face Hub or a folder; needs the `hub` extra", ""),
)
PURIFIERS: dict[str, PurifierSpec] = {spec.name: spec for spec in _ROWS}

FORMER = {  # purifiers until 2026-11 -> what replaced them: other weights, at about their noise level
    "bridge-coarse": "bridge:sigma=0.1",
    "bridge-transfer": "bridge:sigma=0.02",
    "bridge-transfer-large": "bridge-large:sigma=0.02",
}
