"""The verbs that take pictures: purify, ask, caption, attack; and export, which makes what purifies elsewhere."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from codefend.core.registry import lookup
from codefend.types import Budget, CodefendError

if TYPE_CHECKING:
    from torch import Tensor

    from codefend.attacks import AttackSpec
    from codefend.defense import DefendedVictim, Defense
    from codefend.purifiers.jobs import Outcome
    from codefend.types import Purifier

app = typer.Typer()

MAX_PIXELS = 64_000_000  # as images.MAX_PIXELS, which would bring torch along

Picture = Annotated[Path, typer.Argument(metavar="IMAGE", help="A picture file.", show_default=False)]
DefenseName = Annotated[str, typer.Option("--defense", help="none, a purifier or its folder; add +prompt=POLICY.")]
VictimName = Annotated[str, typer.Option("--victim", help="The multimodal model that answers.")]
Seed = Annotated[int, typer.Option("--seed", help="Randomness of the purifier and the attack.")]
MaxPixels = Annotated[int, typer.Option("--max-pixels", min=1, help="Refuse larger pictures.")]
FirstFrame = Annotated[bool, typer.Option("--first-frame", help="Take the first frame of an animation.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace outputs that exist.")]


@app.command()
def purify(
    paths: Annotated[list[str], typer.Argument(metavar="PATH...", help="Pictures or folders.", show_default=False)],
    out: Annotated[str, typer.Option("--out", "-o", help="A picture for one input, else a folder.")],
    purifier: Annotated[str, typer.Option("--purifier", help="A name, or a folder with its weights.")] = "bridge",
    seed: Seed = 0,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Pictures of one size per call.")] = 1,
    max_pixels: MaxPixels = MAX_PIXELS,
    first_frame: FirstFrame = False,
    flatten: Annotated[bool, typer.Option("--flatten", help="Drop transparency, onto white.")] = False,
    ending: Annotated[str | None, typer.Option("--format", help="File type in a folder job, such as png.")] = None,
    quality: Annotated[int | None, typer.Option("--quality", min=1, max=100, help="JPEG, lossy WebP.")] = None,
    max_side: Annotated[
        int | None, typer.Option("--max-side", min=1, help="Shrink larger pictures to this longer side first.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Purify pictures and folders of pictures; the same command goes on after an interruption."""
    from codefend import purifiers
    from codefend.purifiers.jobs import Options, purify_paths

    options = Options(
        purifier=purifier,
        seed=seed,
        batch=batch,
        max_pixels=max_pixels,
        first_frame=first_frame,
        flatten=flatten,
        format=ending,
        quality=quality,
        overwrite=overwrite,
        max_side=max_side,
    )
    outcome = purify_paths(lambda: purifiers.load(purifier), paths, out, options)
    skipped = f", {outcome.skipped} done before" if outcome.skipped else ""
    print(f"purified {outcome.done}{skipped} -> {out}")
    if outcome.failed:
        _tell_failures(outcome)
        raise typer.Exit(1)


def _tell_failures(outcome: Outcome) -> None:
    """Each with its reason, and in the last line how many of how many."""
    for name, reason in outcome.failed:
        print(f"failed: {name}: {reason}", file=sys.stderr)
    names = [name for name, _ in outcome.failed]
    total = outcome.done + outcome.skipped + len(names)
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    print(f"error: {len(names)} of {total} failed: {', '.join(names[:20])}{more}", file=sys.stderr)


@app.command()
def export(
    out: Annotated[Path, typer.Option("--out", "-o", help="The model file, *.onnx.")],
    purifier: Annotated[str, typer.Option("--purifier", help="A name, or a folder with its weights.")] = "bridge",
    overwrite: Overwrite = False,
) -> None:
    """Write a purifier as an ONNX model, checked against torch; it serves without torch."""
    from codefend.purifiers.onnx_export import export_onnx

    _check_free(out, overwrite)
    written = export_onnx(purifier, out)
    print(f"{written.path}: at most {written.difference:.1e} of a pixel from torch")


@app.command()
def ask(
    image: Picture,
    question: Annotated[str, typer.Argument(help="What to ask about it.", show_default=False)],
    defense: DefenseName = "none",
    victim: VictimName = "pocket",
    seed: Seed = 0,
    max_pixels: MaxPixels = MAX_PIXELS,
    first_frame: FirstFrame = False,
) -> None:
    """Ask a multimodal model about a picture, behind a defense or not."""
    pixels = _pixels(image, max_pixels, first_frame)
    print(_defended(victim, defense, seed).generate(pixels, [question])[0])


@app.command()
def caption(
    image: Picture,
    defense: DefenseName = "none",
    victim: VictimName = "pocket",
    seed: Seed = 0,
    max_pixels: MaxPixels = MAX_PIXELS,
    first_frame: FirstFrame = False,
) -> None:
    """Have a multimodal model describe a picture, behind a defense or not."""
    from codefend.tasks.language import CAPTION_PROMPT

    ask(image, CAPTION_PROMPT, defense, victim, seed, max_pixels, first_frame)


@app.command()
def attack(
    image: Picture,
    out: Annotated[Path, typer.Option("--out", "-o", help="The attacked picture, in a lossless format.")],
    name: Annotated[str, typer.Option("--attack", help="See codefend list attacks.")] = "apgd",
    question: Annotated[str | None, typer.Option("--question", help="Attack the answer to this.")] = None,
    describe: Annotated[bool, typer.Option("--caption", help="Attack the description (the default).")] = False,
    answer: Annotated[
        str | None, typer.Option("--answer", help="The right answer; the model's own if left out.")
    ] = None,
    target: Annotated[str, typer.Option("--target", help="Sentence that a targeted attack forces.")] = "",
    target_image: Annotated[Path | None, typer.Option("--target-image", help="For feature-target.")] = None,
    eps: Annotated[str, typer.Option("--eps", help="Radius in [0, 1], as 8/255 or 0.03.")] = "8/255",
    norm: Annotated[str, typer.Option("--norm", help="linf or l2.")] = "linf",
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="The attack's usual number if left out.")] = None,
    defense: DefenseName = "none",
    victim: VictimName = "pocket",
    seed: Seed = 0,
    max_pixels: MaxPixels = MAX_PIXELS,
    overwrite: Overwrite = False,
) -> None:
    """Attack a picture inside a budget, through the whole defense when one is named, and show both answers."""
    from codefend.attacks import ATTACKS
    from codefend.core import images
    from codefend.tasks.language import CAPTION_PROMPT

    spec = lookup("attack", name, ATTACKS)
    if question is not None and describe:
        raise CodefendError("give --question or --caption, not both")
    _check_target(spec, target, target_image)
    _check_lossless(out)
    _check_free(out, overwrite)
    budget = _budget(eps, norm, steps or spec.steps)
    pixels = _pixels(image, max_pixels, False)
    towards = None if target_image is None else _pixels(target_image, max_pixels, False)
    model = _defended(victim, defense, seed)
    prompt = CAPTION_PROMPT if question is None else question
    clean = model.generate(pixels, [prompt])[0]
    adversarial = _attacked(spec, model, pixels, prompt, answer or clean, target, towards, budget, seed)
    images.save(out, adversarial[0])
    print(f"clean:    {clean}\nattacked: {model.generate(adversarial, [prompt])[0]}")


def _check_target(spec: AttackSpec, target: str, target_image: Path | None) -> None:
    """Raises CodefendError where the attack's goal has not been given."""
    from codefend.attacks import NEEDS_SENTENCE

    if spec.goal in NEEDS_SENTENCE and not target:
        raise CodefendError(f"attack {spec.name!r} needs --target, the sentence to force")
    if spec.goal == "feature-target" and target_image is None:
        raise CodefendError(f"attack {spec.name!r} needs --target-image, the picture to imitate")


def _check_lossless(out: Path) -> None:
    from codefend.core import images

    if not images.is_lossless(images.format_of(out)):
        raise CodefendError(f"{out} would lose the perturbation; use .png, .bmp, .tiff or .webp")


def _check_free(out: Path, overwrite: bool) -> None:
    if out.exists() and not overwrite:
        raise CodefendError(f"{out} exists already; use --overwrite to replace it")


def _attacked(
    spec: AttackSpec,
    model: DefendedVictim,
    pixels: Tensor,
    prompt: str,
    answer: str,
    target: str,
    towards: Tensor | None,
    budget: Budget,
    seed: int,
) -> Tensor:
    from codefend.attacks import objective_for
    from codefend.attacks.bounds import quantize_attacked
    from codefend.core.runs import make_generator

    objective = objective_for(spec, model, [prompt], [answer], target, pixels, towards, reference=model.victim)
    attack = spec.build()
    attacked = attack(objective, pixels, budget, generator=make_generator(seed, "attack"))
    return quantize_attacked(attack, attacked, pixels, budget)


def _budget(eps: str, norm: str, steps: int) -> Budget:
    from codefend.core.settings import number

    if norm not in ("linf", "l2"):
        raise CodefendError(f"unknown norm {norm!r}; choose linf or l2")
    radius = number(eps)
    if not 0 <= radius <= (1 if norm == "linf" else 1e4):
        raise CodefendError(f"--eps {eps} is no radius in pixels of [0, 1]; write it as 8/255 or 0.03")
    return Budget(norm="l2" if norm == "l2" else "linf", eps=radius, steps=steps)


def _pixels(path: Path, max_pixels: int, first_frame: bool) -> Tensor:
    from codefend.core import images

    return images.load(path, max_pixels=max_pixels, first_frame=first_frame).pixels[None]


def _defense(name: str) -> Defense:
    """What ``codefend eval`` calls by the same name. Raises CodefendError for unknown names and options."""
    from codefend.bench.config import DefenseChoice
    from codefend.defense import Defense, StraightThrough

    choice = DefenseChoice.parse(name)
    policy = _policy(choice.prompt) if choice.prompt else None
    if choice.name == "none":
        return Defense(None, policy)
    from codefend import purifiers

    purifier: Purifier = purifiers.load(choice.name, **choice.options)
    exact = getattr(purifier, "differentiable", True)  # else attacks take the gradient past it (BPDA)
    return Defense(purifier if exact else StraightThrough(purifier), policy, getattr(purifier, "name", name))


def _policy(name: str) -> Any:
    from codefend.prompts import load_any

    return load_any(name)


def _defended(victim: str, defense: str, seed: int) -> DefendedVictim:
    from codefend import victims
    from codefend.core.runs import make_generator
    from codefend.defense import DefendedVictim

    behind = _defense(defense)  # before the victim, which loads slowly: a misspelt name fails first
    return DefendedVictim(victims.load(victim), behind, generator=make_generator(seed, "defense"))
