"""Crops of photographs without labels: the metric is how closely a defense restores the clean features and answers.

The held-out photographs of scikit-image (CC0 or public domain) or a folder of your own. Crops of one photograph are not
independent examples: with four photographs the results describe these, not photographs in general.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from codefend.core.images import quantize8
from codefend.tasks.metrics import exact_match
from codefend.tasks.training_images import HELD_OUT, own_paths, own_photographs
from codefend.types import CodefendError, Example, Task

CROPS = 8  # of each photograph, without a limit
PROMPT = "Describe the image."


def load_photographs(
    split: str = "test", limit: int | None = None, *, side: int = 224, folder: str = "", seed: int = 0
) -> Task:
    """``limit`` crops of ``side`` pixels, of the photographs in turn: the held-out ones, or those in ``folder``.

    Raises CodefendError for another split than "test", a folder without images or one that cannot be read, or when
    scikit-image is missing.
    """
    if split != "test":
        raise CodefendError("photographs have a test split only")
    names = photograph_names(folder)
    photographs = load_all(folder)
    count = len(names) * CROPS if limit is None else limit
    examples = []
    for number, place in enumerate(islice(cycle(range(len(names))), count)):
        index = number // len(names)
        image = crop(photographs[place], side, [seed, 13, place, index])
        examples.append(Example(f"{names[place]}-{index}", image, PROMPT, kind=names[place]))
    described = f"crops of {len(names)} photographs of your own" if folder else f"crops of {', '.join(names)}"
    licence = "" if folder else "CC0 or public domain"
    return Task("photographs", examples, {"agreement": exact_match}, "agreement", "", described, licence)


def photograph_names(folder: str = "") -> list[str]:
    """The held-out photographs, or the files of ``folder``. Raises CodefendError for a folder without images."""
    return [str(path.relative_to(folder)) for path in own_paths(folder)] if folder else list(HELD_OUT)


def load_all(folder: str = "") -> Sequence[Tensor]:
    """The photographs ``[3, H, W]`` in [0, 1], in the order of `photograph_names`.

    Raises CodefendError when one cannot be read, or scikit-image is missing.
    """
    if folder:
        return own_photographs(str(Path(folder)))
    try:
        from skimage import data
    except ImportError as error:
        raise CodefendError("the photographs are scikit-image's: pip install 'codefend[train]'") from error
    return [torch.from_numpy(getattr(data, name)().copy()).permute(2, 0, 1).float() / 255 for name in HELD_OUT]


def crop(photograph: Tensor, side: int, seed: Sequence[int]) -> Tensor:
    """``[3, side, side]``, 8 bits: a square window of half to all of the photograph's shorter side, resized."""
    rng = np.random.default_rng(list(seed))
    height, width = photograph.shape[-2:]
    window = int(min(height, width) * rng.uniform(0.5, 1.0))
    top, left = int(rng.integers(height - window + 1)), int(rng.integers(width - window + 1))
    view = photograph[None, :, top : top + window, left : left + window]
    resized = F.interpolate(view, (side, side), mode="bicubic", antialias=True, align_corners=False)
    return quantize8(resized.clamp(0, 1))[0]
