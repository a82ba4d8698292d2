"""Image-scaling attacks on the pocket, with and without a defense, and the detector's error rates, as Markdown.

    python benchmarks/scaling.py attack [--limit N] [--kernels K ...] [--defenses D ...]
    python benchmarks/scaling.py clean [--limit N] [--kernels K ...] [--defenses D ...]
    python benchmarks/scaling.py adaptive [--limit N]
    python benchmarks/scaling.py calibrate

The victim shrinks what it gets to 128 x 128 pixels by a kernel. Images of the task "caption" are hidden in photographs
that are held out of all trainings; an attack succeeds when the caption names every object of the hidden image. The
defense "max-side" is the gateway's `--max-side 128`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from codefend import purifiers, tasks, victims
from codefend.attacks.scaling import hide
from codefend.core import images
from codefend.core.kernels import SPARSE, Kernel, resize
from codefend.core.seeds import make_generator
from codefend.purifiers.detection import threshold_at
from codefend.purifiers.rescale import LEVEL, disagreement
from codefend.tasks.metrics import psnr
from codefend.tasks.photographs import load_all
from codefend.tasks.training_images import training_photographs
from codefend.types import Example
from codefend.victims.pocket import Pocket

SIDE = 128  # pixels; the victim's
BATCH = 48  # images of one call of the victim
BIG = 512  # pixels; clean scenes as they are sent
DEFENSES = ("none", "max-side", f"area:side={SIDE}", f"area:side={SIDE},gate=true", f"scaling-median:side={SIDE}")
STRENGTHS = (0.1, 0.15, 0.2, 0.3, 0.5)
Defend = Callable[[Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("attack", "clean", "adaptive", "calibrate"))
    parser.add_argument("--limit", type=int, default=16, help="hidden images")
    parser.add_argument("--kernels", nargs="+", default=SPARSE)
    parser.add_argument("--defenses", nargs="+", default=DEFENSES)
    arguments = parser.parse_args()
    if arguments.verb == "calibrate":
        return calibrate()
    bench = Bench(arguments.limit)
    if arguments.verb == "adaptive":
        return adaptive(bench)
    seen, rows = [], []
    for kernel in arguments.kernels:
        images_sent = bench.attacks(kernel) if arguments.verb == "attack" else bench.scenes()
        for name in arguments.defenses:
            seen.append(torch.cat([shown(defense(name)(image), kernel) for image in images_sent]))
            similarity = cosine(seen[-1], bench.hidden) if arguments.verb == "attack" else bench.kept(kernel, name)
            rows.append((kernel, name, float(similarity.mean())))
            print(*rows[-1], flush=True)
    print("\n| kernel | defense | objects named | cosine |\n|---|---|---|---|")
    for (kernel, name, similarity), named in zip(rows, bench.named(seen), strict=True):
        print(f"| {kernel} | {name} | {float(named.mean()):.3f} | {similarity:.4f} |")


class Bench:
    """The victim, hidden images and covers."""

    def __init__(self, limit: int) -> None:
        victim = victims.load("pocket")
        assert isinstance(victim, Pocket)
        self.victim, self.task = victim, tasks.load("caption", limit=limit)
        self.examples: Sequence[Example] = list(self.task.examples)
        self.hidden = torch.stack([example.image for example in self.examples])
        self.covers = [photograph[None] for photograph in load_all()]

    def cover(self, i: int) -> Tensor:
        return self.covers[i % len(self.covers)]

    def attacked(self, i: int, kernel: Kernel, strength: float = 1.0) -> Tensor:
        """The image that hides example ``i``, in 8 bits."""
        return images.quantize8(hide(self.cover(i), self.hidden[i : i + 1], kernel, strength=strength))

    def attacks(self, kernel: Kernel, strength: float = 1.0) -> list[Tensor]:
        return [self.attacked(i, kernel, strength) for i in range(len(self.examples))]

    def scenes(self) -> list[Tensor]:
        """The hidden images as clean ones of 512 pixels a side."""
        return list(images.quantize8(resize(self.hidden, (BIG, BIG), "bicubic-antialias")).split(1))

    def kept(self, kernel: Kernel, name: str) -> Tensor:
        """Cosine of what the victim sees of each clean photograph, with and without the defense, ``[4]``."""
        defend = defense(name)
        return torch.cat([cosine(shown(defend(cover), kernel), shown(cover, kernel)) for cover in self.covers])

    def named(self, seen: Sequence[Tensor]) -> list[Tensor]:
        """For each batch that the victim sees, whether the captions name each example's objects, ``[N]``."""
        batch = torch.cat(list(seen)).clamp(0, 1)
        examples = [*self.examples] * len(seen)
        answers: list[str] = []
        for start in range(0, len(batch), BATCH):
            part = examples[start : start + BATCH]
            answers += self.victim.generate(batch[start : start + BATCH], [example.prompt for example in part])
        return list(self.task.metrics["all_tags"](answers, examples).split(len(self.examples)))


def shown(image: Tensor, kernel: Kernel) -> Tensor:
    """What the victim sees of an image of any size."""
    return resize(image, (SIDE, SIDE), kernel)


def defense(name: str) -> Defend:
    if name == "none":
        return lambda image: image
    if name == "max-side":
        return lambda image: images.load(images.encode(image[0]), max_side=SIDE).pixels[None]
    purifier = purifiers.load(name)
    return lambda image: images.quantize8(purifier(image, generator=make_generator(0, "scaling")))


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return cosine_similarity((a - 0.5).flatten(1), (b - 0.5).flatten(1))


def adaptive(bench: Bench) -> None:
    """Attackers who know the detector, and who know the area kernel."""
    attackers: list[tuple[Kernel, float]] = [("bilinear", strength) for strength in STRENGTHS]
    attackers.append(("area", 1.0))
    sent = [bench.attacks(kernel, strength) for kernel, strength in attackers]
    seen = [torch.cat([shown(image, attacker[0]) for image in sent[i]]) for i, attacker in enumerate(attackers)]
    print("| kernel | strength | named | undetected | both | cosine of the view to the hidden image | PSNR, dB |")
    print("|---" * 7 + "|")
    best = torch.zeros(len(bench.examples))
    for (kernel, strength), attacked, named in zip(attackers, sent, bench.named(seen), strict=True):
        undetected = torch.cat([disagreement(image, SIDE) for image in attacked]) < LEVEL
        view = cosine(torch.cat([shown(image, "area") for image in attacked]), bench.hidden)
        quality = torch.cat([psnr(image, bench.cover(i)) for i, image in enumerate(attacked)])
        both = named * undetected
        best = torch.maximum(best, both) if kernel == "bilinear" else best
        shares = " | ".join(f"{float(values.float().mean()):.3f}" for values in (named, undetected, both, view))
        print(f"| {kernel} | {strength:g} | {shares} | {float(quality.mean()):.1f} |")
    print(f"named and undetected at the best strength for each image: {float(best.mean()):.3f}")


def calibrate() -> None:
    """The threshold at a false-positive rate of 1% on photographs of the trainings, and the rate on held-out ones."""
    fitted = torch.cat([disagreement(crop, SIDE) for crop in crops(training_photographs(), 400)])
    print(f"threshold at 1% of n = {len(fitted)}: {threshold_at(fitted, 0.01):.4f}; in use: {LEVEL}")
    held_out = torch.cat([disagreement(crop, SIDE) for crop in crops(load_all(), 400)])
    rate = float((held_out >= LEVEL).float().mean())
    print(f"held-out photographs: {100 * rate:.1f}% over it, n = {len(held_out)}; largest {float(held_out.max()):.4f}")
    hidden = [example.image for example in tasks.load("caption", limit=16).examples]
    for kernel in SPARSE:
        covers = list(crops(load_all(), len(hidden)))
        attacked = [images.quantize8(hide(c, h[None], kernel)) for c, h in zip(covers, hidden, strict=True)]
        scores = torch.cat([disagreement(image, SIDE) for image in attacked])
        rate = float((scores >= LEVEL).float().mean())
        print(f"{kernel}: {100 * rate:.1f}% detected, n = {len(scores)}; smallest {float(scores.min()):.4f}")


def crops(photographs: Sequence[Tensor], count: int) -> Iterator[Tensor]:
    """Windows ``[1, 3, H, W]`` of 256 pixels or more a side, from each photograph in turn."""
    rng = np.random.default_rng(0)
    for i in range(count):
        image = photographs[i % len(photographs)]
        height, width = (int(rng.integers(min(2 * SIDE, side), side + 1)) for side in image.shape[1:])
        top, left = (
            int(rng.integers(full - part + 1)) for full, part in zip(image.shape[1:], (height, width), strict=True)
        )
        yield image[None, :, top : top + height, left : left + width]


if __name__ == "__main__":
    with torch.no_grad():
        main()
