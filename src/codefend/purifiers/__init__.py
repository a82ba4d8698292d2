"""Purifiers by name or folder. Importing this module imports neither torch nor any purifier."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from codefend.core.registry import lookup
from codefend.core.specs import parse_spec
from codefend.types import CodefendError

if TYPE_CHECKING:
    from codefend.purifiers.base import Purifier
    from codefend.purifiers.nets import PurifierNet

Build = Callable[[Mapping[str, object]], "Purifier"]

WEIGHTS = Path(__file__).parent.parent / "weights"  # shipped with the package: one folder per purifier


@dataclass(frozen=True)
class PurifierSpec:
    """One entry of the registry. ``build`` takes options as text or typed, and raises CodefendError for wrong ones."""

    name: str
    summary: str
    source: str
    build: Build


def load(name_or_folder: str | Path, **options: Any) -> Purifier:
    """Load ``"bridge"``, ``"jpeg:quality=75"``, ``"diffpure:t=0.15,steps=15"`` or a folder of trained weights.

    ``"hf-diffpure:ID_OR_FOLDER:t=0.1"`` and the other entries with a colon load models of `diffusers`.

    Keywords win over options in the name. Raises CodefendError for an unknown name or option and for a bad folder.
    """
    spec = parse_spec(str(name_or_folder), PURIFIERS)
    name, settings = spec.name, {**spec.options, **options}
    prefix, colon, _ = name.partition(":")
    if colon and name not in PURIFIERS and prefix in FOREIGN:
        return FOREIGN[prefix](name, settings)
    by_place = name not in PURIFIERS and ("/" in name or "\\" in name or Path(name).is_dir())
    if isinstance(name_or_folder, Path) or by_place:
        return _from_folder(Path(name), settings)
    return lookup("purifier", name, PURIFIERS).build(settings)


def _from_folder(folder: Path, settings: Mapping[str, object], *, name: str | None = None) -> Purifier:
    from codefend.purifiers.nets import load_net

    if not folder.is_dir():
        raise CodefendError(f"no such purifier folder: {folder}")
    for file, prefix in MARKS.items():
        if (folder / file).is_file():
            return FOREIGN[prefix](f"{prefix}:{folder}", settings)
    net, meta = load_net(folder)
    net.requires_grad_(False)  # attacks differentiate in the images; a trainer builds its purifier itself
    return wrap_net(net, meta, settings, name=name or folder.resolve().name)


def wrap_net(net: PurifierNet, meta: Mapping[str, Any], settings: Mapping[str, object], *, name: str) -> Purifier:
    """The purifier that ``meta`` (kind, options) says ``net`` is. Raises CodefendError for another kind or option."""
    from codefend.purifiers.base import NetPurifier, configure
    from codefend.purifiers.detection import Detector

    kinds = _kinds()
    if meta.get("kind") not in kinds:
        raise CodefendError(f"{name} holds a network of unknown kind {meta.get('kind')!r}; known: {', '.join(kinds)}")
    make, fallback = kinds[meta["kind"]]
    defaults = configure(fallback, meta.get("options", {}))
    purifier: NetPurifier = make(net, configure(defaults, settings), name=name, defaults=defaults)
    detector = Detector.from_dict(meta["detector"]) if meta.get("detector") else None
    purifier.use_detector(detector, calibrated_for=defaults)
    return purifier.eval()


def _kinds() -> dict[str, tuple[Any, Any]]:
    """The purifier of each kind of weights, and its options where the folder and the user say nothing."""
    from codefend.contrib.peers.flowpure import FlowOptions, FlowPure
    from codefend.contrib.peers.hgd import Hgd, HgdOptions
    from codefend.purifiers.bridge import Bridge, BridgeOptions
    from codefend.purifiers.diffpure import DiffPure, DiffPureOptions

    return {
        "prior": (DiffPure, DiffPureOptions()),
        "bridge": (Bridge, BridgeOptions()),
        "hgd": (Hgd, HgdOptions()),
        "flowpure": (FlowPure, FlowOptions()),
        "flowpure-gauss": (FlowPure, FlowOptions(start=0.5, noise=0.3)),
        # These two are DiffPure's walk with DDIM steps, from their papers' times, on a network trained otherwise.
        "adbm": (DiffPure, DiffPureOptions(t=0.1, steps=5, eta=0.0)),
        "codefend-r": (DiffPure, DiffPureOptions(t=0.15, steps=10, eta=0.0)),
    }


def _shipped(weights: str, name: str) -> Build:
    def build(settings: Mapping[str, object]) -> Purifier:
        folder = WEIGHTS / weights
        if not folder.is_dir():
            raise CodefendError(
                f"the {weights} weights of purifier {name!r} are not installed; train them with "
                f"`codefend train {weights} --run DIR`, then use that folder in place of the name"
            )
        return _from_folder(folder, settings, name=name)

    return build


def _foreign(module: str, function: str) -> Callable[[str, Mapping[str, object]], Purifier]:
    def build(name: str, settings: Mapping[str, object]) -> Purifier:
        made: Purifier = getattr(import_module(module), function)(name, settings)
        return made

    return build


FOREIGN = {  # what stands before a colon and a model's id or folder -> what loads it
    "hf-diffpure": _foreign("codefend.contrib.backbones.pixels", "build_diffpure"),
    "hf-bridge": _foreign("codefend.contrib.backbones.pixels", "build_bridge"),
    "hf-latent": _foreign("codefend.contrib.backbones.latent", "build_latent"),
    "hub": _foreign("codefend.purifiers.hub", "build_hub"),
}
MARKS = {  # a file by which a folder of theirs is known -> the same
    "adapters.safetensors": "hf-latent",
    "model_index.json": "hf-bridge",
    "diffusion_pytorch_model.safetensors": "hub",
}


def _plain(module: str, class_name: str, options_name: str | None = None) -> Build:
    def build(settings: Mapping[str, object]) -> Purifier:
        from codefend.purifiers.base import configure

        home = import_module(module)
        arguments = []
        if options_name is not None:
            arguments = [configure(getattr(home, options_name)(), settings)]
        elif settings:
            raise CodefendError(f"purifier {class_name.lower()!r} has no options")
        purifier: Purifier = getattr(home, class_name)(*arguments)
        return purifier

    return build


PURIFIERS: dict[str, PurifierSpec] = {
    spec.name: spec
    for spec in (
        PurifierSpec(
            "identity", "the picture as it came: no defence", "", _plain("codefend.purifiers.shallow", "Identity")
        ),
        PurifierSpec(
            "jpeg",
            "through a JPEG codec (quality)",
            "Das et al. 2018, arXiv 1802.06816",
            _plain("codefend.purifiers.shallow", "Jpeg", "JpegOptions"),
        ),
        PurifierSpec(
            "bitdepth",
            "fewer bits per colour, then a median filter (bits, median)",
            "Xu et al. 2018, arXiv 1704.01155",
            _plain("codefend.purifiers.shallow", "BitDepth", "BitDepthOptions"),
        ),
        PurifierSpec(
            "median",
            "median filter (size)",
            "Xu et al. 2018, arXiv 1704.01155",
            _plain("codefend.purifiers.shallow", "Median", "MedianOptions"),
        ),
        PurifierSpec("blur", "Gaussian blur (sigma)", "", _plain("codefend.purifiers.shallow", "Blur", "BlurOptions")),
        PurifierSpec(
            "diffpure",
            "noise to time t, then denoise step by step with an unconditional prior (t, steps, eta)",
            "Nie et al. 2022, arXiv 2205.07460",
            _shipped("prior", "diffpure"),
        ),
        PurifierSpec(
            "oidn",
            "noise, then Intel's Open Image Denoise network (sigma); needs the `oidn` extra",
            "https://github.com/RenderKit/oidn, Apache-2.0",
            _plain("codefend.contrib.oidn", "Oidn", "OidnOptions"),
        ),
        PurifierSpec(
            "bridge",
            "supervised diffusion bridge, adversarial to clean, noised (evaluations, sigma, strength, guided, gate)",
            "CoDefend; bridge after arXiv 2302.05872, 2408.00315, 2505.13280; noise after 1902.02918, 1906.04584",
            _shipped("bridge", "bridge"),
        ),
        PurifierSpec(
            "bridge-detail",
            "the bridge without noise: photographs keep their detail, for attacks of known kinds that don't see it",
            "CoDefend; as bridge",
            _shipped("bridge-detail", "bridge-detail"),
        ),
        PurifierSpec(
            "bridge-large",
            "bridge-detail in a network five times as large, for a GPU: also for models that resize their pictures",
            "CoDefend; as bridge",
            _shipped("bridge-large", "bridge-large"),
        ),
        PurifierSpec(
            "bridge-coarse",
            "the bridge trained for words alone, behind noise of 0.1: more captions kept at unseen attacks",
            "CoDefend; as bridge",
            _shipped("bridge-coarse", "bridge-coarse"),
        ),
        PurifierSpec(
            "hgd",
            "peer: one residual evaluation, trained on static pairs to keep a model's features",
            "HGD, Liao et al. 2018, arXiv 1712.02976",
            _shipped("hgd", "hgd"),
        ),
        PurifierSpec(
            "flowpure",
            "peer: Euler steps along a flow from static attacks to clean (steps)",
            "FlowPure-PGD, Collaert et al. 2025, arXiv 2505.13280",
            _shipped("flowpure", "flowpure"),
        ),
        PurifierSpec(
            "flowpure-gauss",
            "peer: noise, then Euler steps along a flow from noise to clean (steps, start, noise)",
            "FlowPure-Gauss, Collaert et al. 2025, arXiv 2505.13280",
            _shipped("flowpure-gauss", "flowpure-gauss"),
        ),
        PurifierSpec(
            "adbm",
            "peer: noise, then DDIM steps of a bridge trained on in-loop perturbations (t, steps)",
            "ADBM, Li et al. 2025, arXiv 2408.00315",
            _shipped("adbm", "adbm"),
        ),
        PurifierSpec(
            "codefend-r",
            "peer: noise, then DDIM steps of a network trained on static pairs, directionally (t, steps)",
            "our reconstruction, in pixels, of CoDefend, Zhu et al. 2025, arXiv 2510.11096",
            _shipped("codefend-r", "codefend-r"),
        ),
        PurifierSpec(
            "hf-diffpure:ID_OR_FOLDER",
            "DiffPure with an unconditional pixel model of diffusers (t, steps, eta)",
            "Nie et al. 2022, arXiv 2205.07460",
            partial(FOREIGN["hf-diffpure"], ""),  # asked for by this very name, it says what is missing
        ),
        PurifierSpec(
            "hf-bridge:ID_OR_FOLDER",
            "such a model walked as a bridge; fine-tune it first, `codefend train hf-bridge` (evaluations, sigma)",
            "CoDefend",
            partial(FOREIGN["hf-bridge"], ""),
        ),
        PurifierSpec(
            "hf-latent:ID_OR_FOLDER",
            "Stable Diffusion in latents (t, steps, eta, consistency); t=0 is its autoencoder alone",
            "CoDefend, arXiv 2510.11096; OSCP, arXiv 2408.17064",
            partial(FOREIGN["hf-latent"], ""),
        ),
        PurifierSpec(
            "hub:ID_OR_FOLDER",
            "one of this project's networks in diffusers' own format, from the hub or a folder",
            "",
            partial(FOREIGN["hub"], ""),
        ),
    )
}
