"""Make docs/assets/hero.png: one image clean, adversarial and purified, with the pocket victim's answers.

The clean and the adversarial image are written next to it, as scene.png and attacked.png.
Usage: python tools/make_hero.py [OUT.png]
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from torch import Tensor

import codefend
from codefend.core import images

EXAMPLE = 5  # of the frozen test set


def main(out: Path) -> None:
    victim, purifier = codefend.load_victim("pocket"), codefend.load_purifier("bridge")
    example = codefend.load_task("caption", limit=EXAMPLE + 1).examples[EXAMPLE]
    clean = example.image[None]
    adversarial = codefend.attack(victim, clean, [example.prompt], list(example.references[:1]), eps=8 / 255, seed=0)
    for name, image in (("scene", clean), ("attacked", adversarial)):
        images.save(out.with_name(f"{name}.png"), image[0])
    purified = codefend.purify(adversarial, purifier)
    panels = {"clean": clean, "adversarial, 8/255": adversarial, "purified by bridge": purified}
    figure, axes = plt.subplots(1, 3, figsize=(9.6, 4.3))
    for axis, (title, image) in zip(axes, panels.items(), strict=True):
        draw(axis, title, image[0], victim.generate(image, [example.prompt])[0])
    figure.tight_layout()
    figure.savefig(out, dpi=100)
    print(out)


def draw(axis: plt.Axes, title: str, image: Tensor, answer: str) -> None:
    axis.imshow(image.permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
    axis.set_title(title, fontsize=13)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_xlabel("\n".join(textwrap.wrap(f"“{answer}”", 34)), fontsize=10)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/assets/hero.png"))
