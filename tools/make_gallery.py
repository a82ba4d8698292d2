"""Make docs/assets/gallery.jpg: images clean, adversarial and purified, and their differences, at two radii.

Scenes are attacked through the pocket victim (APGD on the language-model loss), photographs through EfficientNet-Lite0
(PGD on its features); neither attack knows the defense. Usage: python tools/make_gallery.py [OUT.jpg]
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor

import codefend
from codefend import encoders
from codefend.attacks.norms import quantize_in_budget
from codefend.attacks.pgd import PGD
from codefend.core.seeds import make_generator
from codefend.tasks.photographs import load_photographs
from codefend.types import Budget

RADII = (4, 8)  # of 255
SCENE, PHOTOGRAPHS = 9, (1, 2)  # of the frozen test set; of the held-out photographs
SCALE = 8  # differences are drawn this much larger, around grey
STEPS = 40
COLUMNS = ("clean", "adversarial", "purified", f"adversarial - clean, x{SCALE}", f"purified - clean, x{SCALE}")


@dataclass(frozen=True)
class Strip:
    """One row of the gallery: three images ``[3, H, W]``, and what a model makes of each."""

    title: str
    images: tuple[Tensor, Tensor, Tensor]
    answers: tuple[str, str, str]


def scene_strips(purifier: codefend.Purifier) -> Iterator[Strip]:
    victim = codefend.load_victim("pocket")
    example = codefend.load_task("caption", limit=SCENE + 1).examples[SCENE]
    clean, reference = example.image[None], list(example.references[:1])
    for eps in RADII:
        adversarial = codefend.attack(victim, clean, [example.prompt], reference, eps=eps / 255, steps=STEPS, seed=0)
        images = clean, adversarial, purify(purifier, adversarial)
        answers = [victim.generate(image, [example.prompt])[0] for image in images]
        yield Strip(f"scene, {eps}/255", tuple(image[0] for image in images), tuple(answers))


def photograph_strips(purifier: codefend.Purifier) -> Iterator[Strip]:
    encoder = encoders.shared("lite0")
    for number in PHOTOGRAPHS:
        clean = load_photographs(limit=4).examples[number].image[None]
        with torch.no_grad():
            tokens = encoder(clean)

        def cosine(images: Tensor, tokens: Tensor = tokens) -> Tensor:
            return torch.nn.functional.cosine_similarity(encoder(images), tokens, dim=-1).mean(1)

        for eps in RADII:
            budget = Budget(eps=eps / 255, steps=STEPS)
            adversarial = PGD(rel_step=2.5)(cosine, clean, budget, generator=make_generator(0, "gallery", eps))
            adversarial = quantize_in_budget(adversarial, clean, budget)
            images = clean, adversarial, purify(purifier, adversarial)
            answers = [f"cosine of features {float(cosine(image).detach()):.2f}" for image in images]
            yield Strip(f"photograph, {eps}/255", tuple(image[0] for image in images), tuple(answers))


def purify(purifier: codefend.Purifier, images: Tensor) -> Tensor:
    with torch.no_grad():
        return purifier(images, generator=torch.Generator().manual_seed(0))


def draw(strips: list[Strip], out: Path) -> None:
    figure, rows = plt.subplots(len(strips), 5, figsize=(12, 2.95 * len(strips)), layout="constrained")
    for axes, strip in zip(rows, strips, strict=True):
        clean, adversarial, purified = strip.images
        changes = [(image - clean) * SCALE + 0.5 for image in (adversarial, purified)]
        for axis, image, answer in zip(axes, (*strip.images, *changes), (*strip.answers, "", ""), strict=True):
            axis.imshow(image.permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_xlabel("\n".join(textwrap.wrap(answer, 26)), fontsize=9)
        axes[0].set_ylabel(strip.title, fontsize=11)
    for axis, title in zip(rows[0], COLUMNS, strict=True):
        axis.set_title(title, fontsize=11)
    figure.savefig(out, dpi=80, pil_kwargs={"quality": 85})


if __name__ == "__main__":
    torch.set_num_threads(1)
    bridge = codefend.load_purifier("bridge")
    draw([*scene_strips(bridge), *photograph_strips(bridge)], Path(*sys.argv[1:2] or ["docs/assets/gallery.jpg"]))
