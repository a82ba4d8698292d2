"""Verbs that show an image to a model: ask, caption, attack."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from codefend.cli.options import (
    MAX_PIXELS,
    DefenseName,
    FirstFrame,
    MaxPixels,
    Overwrite,
    Seed,
    VictimName,
    check_output,
)
from codefend.types import CodefendError

if TYPE_CHECKING:
    from torch import Tensor

    from codefend.defense import DefendedVictim

app = typer.Typer()

ImageFile = Annotated[Path, typer.Argument(metavar="IMAGE", help="An image file.", show_default=False)]


@app.command()
def ask(
    image: ImageFile,
    question: Annotated[str, typer.Argument(help="The question.", show_default=False)],
    defense: DefenseName = "none",
    victim: VictimName = "pocket",
    seed: Seed = 0,
    max_pixels: MaxPixels = MAX_PIXELS,
    first_frame: FirstFrame = False,
) -> None:
    """Ask a multimodal model a question about an image.

    Example: codefend ask photo.png "What is in the top left?" --defense bridge
    """
    pixels = _load_pixels(image, max_pixels, first_frame)
    print(_load_defended(victim, defense, seed).generate(pixels, [question])[0])


@app.command()
def caption(
    image: ImageFile,
    defense: DefenseName = "none",
    victim: VictimName = "pocket",
    seed: Seed = 0,
    max_pixels: MaxPixels = MAX_PIXELS,
    first_frame: FirstFrame = False,
) -> None:
    """Describe an image with a multimodal model.

    Example: codefend caption photo.png --defense bridge
    """
    from codefend.tasks.language import CAPTION_PROMPT

    ask(image, CAPTION_PROMPT, defense, victim, seed, max_pixels, first_frame)


@app.command()
def attack(
    image: ImageFile,
    out: Annotated[Path, typer.Option("--out", "-o", help="The adversarial image, in a lossless format.")],
    name: Annotated[str, typer.Option("--attack", help="See `codefend list attacks`.")] = "apgd",
    question: Annotated[str | None, typer.Option("--question", help="Attack the answer to this question.")] = None,
    describe: Annotated[bool, typer.Option("--caption", help="Attack the description (the default).")] = False,
    answer: Annotated[
        str | None, typer.Option("--answer", help="The correct answer; default: the model's answer to the image.")
    ] = None,
    target: Annotated[str, typer.Option("--target", help="Sentence that a targeted attack forces.")] = "",
    target_image: Annotated[
        Path | None, typer.Option("--target-image", help="Image that feature-target imitates or scaling-* hides.")
    ] = None,
    eps: Annotated[str, typer.Option("--eps", help="Radius, pixels in [0, 1]: 8/255 or 0.03.")] = "8/255",
    norm: Annotated[str, typer.Option("--norm", help="linf or l2.")] = "linf",
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Steps; default: the attack's own.")] = None,
    defense: DefenseName = "none",
    victim: VictimName = "pocket",
    seed: Seed = 0,
    max_pixels: MaxPixels = MAX_PIXELS,
    overwrite: Overwrite = False,
) -> None:
    """Attack an image within a budget, optionally through a defense, and print both answers.

    Example: codefend attack photo.png -o adversarial.png --defense bridge
    """
    from codefend.attacks import attack as run_attack
    from codefend.attacks import check_target
    from codefend.core import images
    from codefend.core.settings import number
    from codefend.tasks.language import CAPTION_PROMPT

    if question is not None and describe:
        raise CodefendError("give --question or --caption, not both")
    check_target(name, target, target_image)
    _check_lossless(out)
    check_output(out, overwrite)
    radius = number(eps)
    pixels = _load_pixels(image, max_pixels, False)
    target_pixels = None if target_image is None else _load_pixels(target_image, max_pixels, False)
    model = _load_defended(victim, defense, seed)
    prompt = CAPTION_PROMPT if question is None else question
    clean = model.generate(pixels, [prompt])[0]
    adversarial = run_attack(
        model,
        pixels,
        [prompt],
        [answer or clean],
        attack=name,
        eps=radius,
        norm=norm,
        steps=steps,
        target=target,
        target_images=target_pixels,
        reference=model.victim,
        seed=seed,
    )
    images.save(out, adversarial[0])
    print(f"clean:    {clean}\nattacked: {model.generate(adversarial, [prompt])[0]}")


def _check_lossless(out: Path) -> None:
    from codefend.core import images

    if not images.is_lossless(images.format_of(out)):
        raise CodefendError(f"{out} would lose the perturbation; use .png, .bmp, .tiff or .webp")


def _load_pixels(path: Path, max_pixels: int, first_frame: bool) -> Tensor:
    from codefend.core import images

    return images.load(path, max_pixels=max_pixels, first_frame=first_frame).pixels[None]


def _load_defended(victim: str, defense: str, seed: int) -> DefendedVictim:
    from codefend import victims
    from codefend.core.seeds import make_generator
    from codefend.defense import DefendedVictim, Defense

    loaded = Defense.from_spec(defense)  # before the victim, which loads slowly: a typo fails early
    return DefendedVictim(victims.load(victim), loaded, generator=make_generator(seed, "defense"))
