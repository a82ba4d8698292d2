"""Purified images and detection scores of every shipped weight, and of each option that changes what they do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from goldens import kit

NAMES = (
    "bridge",
    "bridge-detail",
    "bridge-large",
    "diffpure:t=0.05,steps=5",
    "bridge:sigma=0.1",
    "bridge:evaluations=2,strength=0.5",
    "bridge-detail:gate=true",
    "bridge-large:guided=0.2",
    "jpeg",
    "jpeg:quality=40",
    "bitdepth",
    "median",
    "blur",
)
SEED = 20261129


HALF_OPEN = 0.2  # share of the perturbation at which the gate of bridge-detail lets a part of the image pass


def batch(name: str = "input") -> torch.Tensor:
    """``[1, 3, 44, 36]``: no multiple of what the networks need, so that padding counts."""
    return torch.from_numpy(kit.input_image(name).astype(np.float32) / 255).permute(2, 0, 1)[None].contiguous()


def purified() -> tuple[dict[str, Any], kit.Arrays]:
    """For each name the score, the hash of the purified image, and the image itself."""
    import codefend

    records, arrays = {}, {}
    attacked, weakly = batch(), torch.lerp(batch("clean"), batch(), HALF_OPEN)
    with kit.deterministic(), torch.no_grad():
        for name in NAMES:
            purifier: Any = codefend.load_purifier(name)
            images = weakly if "gate" in name else attacked
            output = purifier(images, generator=torch.Generator().manual_seed(SEED))[0].numpy()
            score = purifier.score(images, generator=torch.Generator().manual_seed(SEED))
            arrays[name] = output
            records[name] = {"sha256": kit.digest(output), "score": float(score[0]), "name": str(purifier.name)}
    return records, arrays


def gradient() -> dict[str, float]:
    """Adaptive attacks live on it: sums of the gradient of the mean output, per purifier."""
    import codefend

    norms = {}
    with kit.deterministic():
        for name in ("bridge", "bridge-detail", "diffpure:t=0.05,steps=2", "median", "blur"):
            images = batch().requires_grad_()
            weights = torch.linspace(-1, 1, images.numel()).view_as(images)
            purifier: Any = codefend.load_purifier(name)
            (purifier(images, generator=torch.Generator().manual_seed(SEED)) * weights).sum().backward()
            assert images.grad is not None
            norms[name] = float(images.grad.square().sum().sqrt())
    return norms


def kinds_of_files() -> dict[str, Image.Image]:
    """Images as users have them: colour, transparency, grey, a palette, 16 bits."""
    colour = Image.fromarray(kit.input_image())
    clear = colour.copy()
    clear.putalpha(Image.linear_gradient("L").resize(colour.size))
    deep = Image.fromarray(np.asarray(colour.convert("L")).astype(np.uint16) * 257)
    return {
        "colour.png": colour,
        "clear.png": clear,
        "grey.png": colour.convert("L"),
        "palette.png": colour.quantize(16, dither=Image.Dither.NONE),
        "deep.png": deep,
        "inner/colour.bmp": colour,
    }


def folder_job(place: Path) -> dict[str, Any]:
    """``codefend purify FOLDER``: which files come out, and what is in them; then once more, which does nothing."""
    for name, image in kinds_of_files().items():
        (place / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(place / "in" / name)
    arguments = ("purify", place / "in", "--out", place / "out", "--purifier", "median:size=3")
    with kit.deterministic():
        first = kit.run(*arguments)
        again = kit.run(*arguments)
        bridged = kit.run("purify", place / "in" / "colour.png", "-o", place / "one.png", "--seed", 3, "--max-side", 40)
    files = sorted(p for p in (place / "out").rglob("*") if p.is_file() and p.name[0] != "." and p.suffix in SUFFIXES)
    return {
        "codes": [first.code, again.code, bridged.code],
        "files": {str(p.relative_to(place / "out")): describe(p) for p in files},
        "one": small(place / "one.png"),
    }


SUFFIXES = (".png", ".bmp", ".jpg", ".webp", ".tiff")


def describe(path: Path) -> dict[str, Any]:
    with Image.open(path) as image:
        pixels: NDArray[Any] = np.asarray(image)
        return {"mode": image.mode, "size": list(image.size), "sha256": kit.digest(pixels)}


def small(path: Path) -> dict[str, Any]:
    """Size and means of a network's output, whose pixels differ by a level between processors."""
    with Image.open(path) as image:
        means = np.asarray(image.convert("RGB")).reshape(-1, 3).mean(0)
        return {"mode": image.mode, "size": list(image.size), "means": [float(mean) for mean in means]}
