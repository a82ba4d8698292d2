"""Crops of photographs: the held-out ones of scikit-image (CC0 or public domain) or a folder of your own.

``photographs`` has no labels: the metric is how closely a defense restores the clean features and answers.
``photo-caption`` and ``photo-vqa`` ask by ImageNet class. The held-out photographs are labelled by hand, those of a
folder by EfficientNet-Lite0 where it gives one class more than half of the probability, other crops left out. In that
case the tasks measure how an attack changes an answer, not whether the answer is true.

Crops of one photograph are not independent examples: with four photographs the results describe these, not photographs
in general.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from codefend import encoders
from codefend.core.assets import needs
from codefend.core.images import quantize8
from codefend.encoders import CLASS_SIDE, SURE, class_names
from codefend.encoders.base import Classifier
from codefend.encoders.views import fit_square
from codefend.tasks.language import CAPTION_PROMPT
from codefend.tasks.metrics import exact_match, holds_phrase
from codefend.tasks.readers import CAPTION_TARGET, VQA_TARGET
from codefend.tasks.training_images import HELD_OUT, own_paths, own_photographs
from codefend.types import CodefendError, Example, Task

CROPS = 8  # of each photograph, without a limit
PROMPT = "Describe the image."
LABELS = {  # correct class names for crops of the held-out photographs; the astronaut shows none of the classes
    "chelsea": ("Egyptian cat", "tabby", "tiger cat"),
    "coffee": ("espresso", "cup", "coffee mug"),
    "rocket": ("missile", "projectile"),
}
TRIES = 4  # crops of a photograph of a folder for each that is wanted
PHOTO = "a photo"  # caption without a class
OBJECT, EXISTENCE = "What is in the photo?", "Is there {} in the photo?"
UNSURE = "not sure"  # answer to OBJECT without a class

Crop = tuple[str, Tensor, tuple[str, ...]]  # id, image, class names that are correct


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
        name = names[place]
        examples.append(Example(f"{name}-{index}", image, PROMPT, kind=name, source=name))
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
    with needs("this task", "train"):
        from skimage import data
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


# --- by ImageNet class ------------------------------------------------------------------------------------------------


def with_article(name: str) -> str:
    """ "a tabby", "an espresso"."""
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def caption(name: str) -> str:
    """The caption of a photograph of this class; "" for none."""
    return f"{PHOTO} of {with_article(name)}" if name else PHOTO


def names_class(answers: Sequence[str], examples: Sequence[Example]) -> Tensor:
    """1 where the answer holds the class name of one of the references, else 0, ``[N]``."""
    pairs = zip(answers, examples, strict=True)
    return torch.tensor([float(any(holds_phrase(a, tag) for tag in e.tags)) for a, e in pairs])


def load_photo_task(
    kind: str, split: str = "test", limit: int | None = None, *, side: int = 224, folder: str = "", seed: int = 0
) -> Task:
    """``kind`` caption or vqa; crops of ``side`` pixels of the photographs in turn, at most ``limit``.

    Raises CodefendError for another split than "test", a folder without images, or one of whose crops no class is sure;
    or when scikit-image or, with a folder, the encoder's weights are missing.
    """
    if split != "test":
        raise CodefendError("photographs have a test split only")
    crops = _folder_crops(folder, int(side), int(seed), limit) if folder else _labelled_crops(int(side), int(seed))
    rows = list(islice(crops, limit))
    if not rows:
        raise CodefendError(f"no crop of the images in {folder} shows an ImageNet class; give other photographs")
    described = f"crops of photographs in {folder}" if folder else f"crops of {', '.join(LABELS)}, labelled by hand"
    licence = "" if folder else "CC0 or public domain (scikit-image)"
    if kind == "caption":
        examples = [_caption_example(*row) for row in rows]
        return Task(
            "photo-caption", examples, {"names_class": names_class}, "names_class", CAPTION_TARGET, described, licence
        )
    examples = [_question(*row, number=i) for i, row in enumerate(rows)]
    return Task("photo-vqa", examples, {"exact_match": exact_match}, "exact_match", VQA_TARGET, described, licence)


def _labelled_crops(side: int, seed: int) -> Iterator[Crop]:
    names, photographs = photograph_names(), load_all()
    for index in range(CROPS):
        for place, name in enumerate(names):
            if name in LABELS:
                yield f"{name}-{index}", crop(photographs[place], side, [seed, 14, place, index]), LABELS[name]


def _folder_crops(folder: str, side: int, seed: int, limit: int | None) -> Iterator[Crop]:
    encoder = encoders.shared("lite0")
    assert isinstance(encoder, Classifier)
    names, photographs = photograph_names(folder), load_all(folder)
    each = CROPS if limit is None else -(-limit // len(names))
    for index in range(TRIES * each):
        for place, name in enumerate(names):
            image = crop(photographs[place], side, [seed, 14, place, index])
            with torch.no_grad():
                probability, label = encoder.logits(fit_square(image[None], CLASS_SIDE)).softmax(-1)[0].max(0)
            if probability > SURE:
                yield f"{name}-{index}", image, (class_names()[int(label)],)


def _source(name: str) -> str:
    """The photograph of the crop ``name``."""
    return name.rpartition("-")[0]


def _caption_example(name: str, image: Tensor, labels: tuple[str, ...]) -> Example:
    return Example(f"{name}-c", image, CAPTION_PROMPT, tuple(map(caption, labels)), "caption", labels, _source(name))


def _question(name: str, image: Tensor, labels: tuple[str, ...], *, number: int) -> Example:
    """Every second question asks for the class; the others ask whether a class is there, yes and no in turn."""
    if number % 2 == 0:
        return Example(f"{name}-q", image, OBJECT, labels, "object", source=_source(name))
    if number % 4 == 1:
        prompt, answer = EXISTENCE.format(with_article(labels[0])), "yes"
        return Example(f"{name}-q", image, prompt, (answer,), "existence", source=_source(name))
    others = [other for other in class_names() if other not in labels]
    other = others[int(np.random.default_rng([15, number]).integers(len(others)))]
    prompt, answer = EXISTENCE.format(with_article(other)), "no"
    return Example(f"{name}-q", image, prompt, (answer,), "existence", source=_source(name))
