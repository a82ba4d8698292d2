"""Purifiers by name or folder. Importing this module imports neither torch nor any purifier."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from codefend.registry import lookup
from codefend.settings import parse_settings
from codefend.types import UserError

if TYPE_CHECKING:
    from codefend.purifiers.base import ImagePurifier

Build = Callable[[Mapping[str, object]], "ImagePurifier"]

WEIGHTS = Path(__file__).parent.parent / "weights"  # shipped with the package: one folder per purifier


@dataclass(frozen=True)
class PurifierSpec:
    """One entry of the registry. ``build`` takes options as text or typed, and raises UserError for wrong ones."""

    name: str
    summary: str
    source: str
    build: Build


def load(name_or_folder: str | Path, **options: Any) -> ImagePurifier:
    """Load ``"bridge"``, ``"jpeg:quality=75"``, ``"diffpure:t=0.15,steps=15"`` or a folder of trained weights.

    Keywords win over options in the name. Raises UserError for an unknown name or option and for a bad folder.
    """
    name, settings = _split(str(name_or_folder))
    settings |= options
    by_place = name not in PURIFIERS and ("/" in name or "\\" in name or Path(name).is_dir())
    if isinstance(name_or_folder, Path) or by_place:
        return _from_folder(Path(name), settings)
    return lookup("purifier", name, PURIFIERS).build(settings)


def _split(text: str) -> tuple[str, dict[str, object]]:
    head, colon, tail = text.rpartition(":")
    if not colon or Path(text).is_dir() or not (head in PURIFIERS or "=" in tail):
        return text, {}
    return head, dict(parse_settings([item for item in tail.split(",") if item]))


def _from_folder(folder: Path, settings: Mapping[str, object], *, name: str | None = None) -> ImagePurifier:
    from codefend.nets import load_net
    from codefend.purifiers.base import configure, spelled
    from codefend.purifiers.detection import Detector

    if not folder.is_dir():
        raise UserError(f"no such purifier folder: {folder}")
    kinds = _kinds()
    net, meta = load_net(folder)
    if meta.get("kind") not in kinds:
        raise UserError(f"{folder} holds a network of unknown kind {meta.get('kind')!r}; known: {', '.join(kinds)}")
    make, fallback = kinds[meta["kind"]]
    net.requires_grad_(False)  # attacks differentiate in the images; a trainer builds its purifier itself
    defaults = configure(fallback, meta.get("options", {}))
    options = configure(defaults, settings)
    purifier: ImagePurifier = make(net, options, name=spelled(name or folder.resolve().name, options, defaults))
    if meta.get("detector") and options == defaults:  # other options leave other residuals: its rates wouldn't hold
        purifier.detector = Detector.from_dict(meta["detector"])
    return purifier


def _kinds() -> dict[str, tuple[Any, Any]]:
    """The purifier of each kind of weights, and its options where the folder and the user say nothing."""
    from codefend.purifiers.bridge import Bridge, BridgeOptions
    from codefend.purifiers.diffpure import DiffPure, DiffPureOptions
    from codefend.purifiers.peers import FlowOptions, FlowPure, Hgd, HgdOptions

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
    def build(settings: Mapping[str, object]) -> ImagePurifier:
        folder = WEIGHTS / weights
        if not folder.is_dir():
            raise UserError(
                f"the {weights} weights of purifier {name!r} are not installed; train them with "
                f"`codefend train {weights} --run DIR`, then use that folder in place of the name"
            )
        return _from_folder(folder, settings, name=name)

    return build


def _plain(module: str, class_name: str, options_name: str | None = None) -> Build:
    def build(settings: Mapping[str, object]) -> ImagePurifier:
        from codefend.purifiers.base import configure

        home = import_module(f"codefend.purifiers.{module}")
        arguments = []
        if options_name is not None:
            arguments = [configure(getattr(home, options_name)(), settings)]
        elif settings:
            raise UserError(f"purifier {class_name.lower()!r} has no options")
        purifier: ImagePurifier = getattr(home, class_name)(*arguments)
        return purifier

    return build


PURIFIERS: dict[str, PurifierSpec] = {
    spec.name: spec
    for spec in (
        PurifierSpec("identity", "the picture as it came: no defence", "", _plain("shallow", "Identity")),
        PurifierSpec(
            "jpeg",
            "through a JPEG codec (quality)",
            "Das et al. 2018, arXiv 1802.06816",
            _plain("shallow", "Jpeg", "JpegOptions"),
        ),
        PurifierSpec(
            "bitdepth",
            "fewer bits per colour, then a median filter (bits, median)",
            "Xu et al. 2018, arXiv 1704.01155",
            _plain("shallow", "BitDepth", "BitDepthOptions"),
        ),
        PurifierSpec(
            "median",
            "median filter (size)",
            "Xu et al. 2018, arXiv 1704.01155",
            _plain("shallow", "Median", "MedianOptions"),
        ),
        PurifierSpec("blur", "Gaussian blur (sigma)", "", _plain("shallow", "Blur", "BlurOptions")),
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
            _plain("oidn", "Oidn", "OidnOptions"),
        ),
        PurifierSpec(
            "bridge",
            "supervised diffusion bridge from adversarial to clean, 1 to 4 evaluations (evaluations, sigma)",
            "CoDefend; bridge after arXiv 2302.05872, 2408.00315 and 2505.13280",
            _shipped("bridge", "bridge"),
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
    )
}
