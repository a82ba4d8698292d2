"""Verbs for images: purify, ask, caption, attack."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from codefend.cli.options import (
    MAX_PIXELS,
    Address,
    DefenseName,
    Engine,
    FirstFrame,
    MaxPixels,
    Overwrite,
    PurifierName,
    RayFlags,
    Seed,
    VictimName,
    WorkerCpus,
    WorkerGpus,
    check_output,
)
from codefend.types import CodefendError

if TYPE_CHECKING:
    from torch import Tensor

    from codefend.defense import DefendedVictim
    from codefend.purifiers.folders import FolderReport
    from codefend.purifiers.text_policy import TextPolicyName

app = typer.Typer()

ImageFile = Annotated[Path, typer.Argument(metavar="IMAGE", help="An image file.", show_default=False)]


@app.command()
def purify(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...", help="Images, folders, Parquet files, tar archives; paths or URLs.", show_default=False
        ),
    ],
    out: Annotated[str, typer.Option("--out", "-o", help="An image file for one input, otherwise a folder or URL.")],
    purifier: PurifierName = "bridge",
    seed: Seed = 0,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Images of one size per call.")] = 1,
    max_pixels: MaxPixels = MAX_PIXELS,
    first_frame: FirstFrame = False,
    flatten: Annotated[bool, typer.Option("--flatten", help="Composite transparent images on white.")] = False,
    file_format: Annotated[
        str | None, typer.Option("--format", help="File format of the outputs of a folder, such as png.")
    ] = None,
    quality: Annotated[
        int | None, typer.Option("--quality", min=1, max=100, help="Quality of JPEG and lossy WebP.")
    ] = None,
    max_side: Annotated[
        int | None,
        typer.Option("--max-side", min=1, help="First shrink larger images to this longer side, by area averaging."),
    ] = None,
    text: Annotated[
        str,
        typer.Option("--text", help="Text in images: off, report, redact, redact-all or block (extra ocr)."),
    ] = "off",
    overwrite: Overwrite = False,
    column: Annotated[
        str | None, typer.Option("--column", help="Image column of Parquet files; default: all of datasets' type.")
    ] = None,
    keep_others: Annotated[
        bool, typer.Option("--keep-others", help="Also copy the files of folders that are no images.")
    ] = False,
    shard: Annotated[
        str | None, typer.Option("--shard", metavar="I/N", help="Do part I of N, from 1/N to N/N.")
    ] = None,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Processes; with ray, the most of them.")] = 1,
    engine: Engine = "local",
    worker_cpus: WorkerCpus = 1,
    worker_gpus: WorkerGpus = 0,
    address: Address = None,
) -> None:
    """Purify images, folders, Parquet files and tar archives. Rerun the command to resume.

    Example: codefend purify photos/ -o clean/
    """
    from codefend import purifiers
    from codefend.cli.corpus import CorpusFlags, purify_as_corpus
    from codefend.purifiers.folders import FolderOptions, purify_paths

    options = FolderOptions(
        text=_text_policy(text),
        purifier=purifier,
        seed=seed,
        batch=batch,
        max_pixels=max_pixels,
        first_frame=first_frame,
        flatten=flatten,
        format=file_format,
        quality=quality,
        overwrite=overwrite,
        max_side=max_side,
    )
    flags = CorpusFlags(column, keep_others, shard, engine, RayFlags(workers, worker_cpus, worker_gpus, address))
    if purify_as_corpus(paths, out, options, flags):
        return
    outcome = purify_paths(lambda: purifiers.load(purifier), paths, out, options)
    skipped = f", {outcome.skipped} skipped (purified before)" if outcome.skipped else ""
    print(f"purified {outcome.done}{skipped} -> {out}")
    for name, lines in outcome.instructions:
        print(f"text that reads like instructions: {name}: {' / '.join(lines)}")
    if outcome.failed:
        _print_failures(outcome)
        raise typer.Exit(1)


def _text_policy(name: str) -> TextPolicyName:
    """``name`` as a policy that needs no model. Raises CodefendError for another, and without the `ocr` extra."""
    if name not in ("off", "report", "redact", "redact-all", "block"):
        raise CodefendError(f"--text is off, report, redact, redact-all or block, not {name!r}")
    if name != "off":
        from codefend.purifiers import ocr

        ocr.check_installed()
    return cast("TextPolicyName", name)


def _print_failures(outcome: FolderReport) -> None:
    for name, reason in outcome.failed:
        print(f"failed: {name}: {reason}", file=sys.stderr)
    names = [name for name, _ in outcome.failed]
    total = outcome.done + outcome.skipped + len(names)
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    print(f"error: {len(names)} of {total} failed: {', '.join(names[:20])}{more}", file=sys.stderr)


@app.command()
def export(
    out: Annotated[Path, typer.Option("--out", "-o", help="The model file, *.onnx.")],
    purifier: PurifierName = "bridge",
    overwrite: Overwrite = False,
) -> None:
    """Export a purifier as an ONNX model, verified against torch.

    Example: codefend export -o bridge.onnx --purifier bridge:sigma=0
    """
    from codefend.purifiers.onnx_export import export_onnx

    check_output(out, overwrite)
    model = export_onnx(purifier, out)
    print(f"{model.path}: differs from torch by {model.difference:.1e} at most, pixels in [0, 1]")


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
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Default: the attack's own.")] = None,
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
