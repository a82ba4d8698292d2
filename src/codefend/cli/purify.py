"""Verbs of purifiers: purify (images, folders, and corpora of Parquet files, tar archives and URLs), export."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from codefend.cli.options import (
    MAX_PIXELS,
    ONE_PROCESS,
    Address,
    Engine,
    EngineName,
    FirstFrame,
    MaxPixels,
    Overwrite,
    PurifierName,
    RayFlags,
    Seed,
    WorkerCpus,
    WorkerGpus,
    check_output,
)
from codefend.types import CodefendError

if TYPE_CHECKING:
    from codefend.purifiers.corpus import CorpusReport
    from codefend.purifiers.corpus import Engine as RunUnits
    from codefend.purifiers.folders import FolderOptions, FolderReport
    from codefend.purifiers.text_policy import TextPolicyName

app = typer.Typer()


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
        str | None,
        typer.Option(
            "--format", help="File format of outputs in a folder, such as png; a single file has that of --out."
        ),
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
        bool, typer.Option("--keep-others", help="Also copy the files of folders that are not images.")
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
    from codefend.core.processes import keep_freed_memory
    from codefend.purifiers import load
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
    as_corpus = flags != CorpusFlags() or _holds_units(paths, out)
    keep_freed_memory()
    if as_corpus:
        _purify_corpus(paths, out, options, flags)
        return
    outcome = purify_paths(lambda: load(purifier), paths, out, options)
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


@dataclass(frozen=True)
class CorpusFlags:
    """The flags of `codefend purify` that concern a corpus; see their help."""

    column: str | None = None
    keep_others: bool = False
    shard: str | None = None
    engine: EngineName = "local"
    ray: RayFlags = ONE_PROCESS


def _holds_units(paths: Sequence[str], out: str) -> bool:
    """Whether purifying needs `codefend.purifiers.corpus`: a URL, an archive or a table, or a folder that holds one."""
    from codefend.purifiers.image_files import TABLES, TARS

    if any("://" in path or "::" in path for path in (*paths, out)):
        return True
    names = (name for path in map(Path, paths) for name in (path, *(path.rglob("*") if path.is_dir() else ())))
    return any(name.name.lower().endswith(TARS + TABLES) for name in names)


def _purify_corpus(paths: Sequence[str], out: str, options: FolderOptions, flags: CorpusFlags) -> None:
    """Purify a corpus and print what was done.

    Raises typer.Exit(1) when images or files failed, and CodefendError as `purify_corpus`.
    """
    from codefend.purifiers.corpus import CorpusOptions, parse_shard, purify_corpus
    from codefend.purifiers.image_files import is_image_name, kind_of

    if (is_image_name(out) or kind_of(out)) and not Path(out).is_dir():
        raise CodefendError(f"{out} names one file; name a folder, where outputs have the names of their sources")
    shard = parse_shard(flags.shard or "1/1")
    report = purify_corpus(
        paths, out, CorpusOptions(options, flags.column, flags.keep_others, shard), _choose_engine(flags)
    )
    skipped = f", {report.skipped} units skipped (purified before)" if report.skipped else ""
    print(f"purified {report.images} images in {report.units} units{skipped} -> {out}")
    if report.failures:
        _print_corpus_failures(report, out)
        raise typer.Exit(1)


def _choose_engine(flags: CorpusFlags) -> RunUnits:
    """The engine of ``--engine`` and ``--workers``. Raises CodefendError for a missing package."""
    if flags.engine == "ray":
        from codefend.integrations.ray import RayOptions, on_ray

        return on_ray(RayOptions(*flags.ray))
    from codefend.purifiers.corpus import in_processes, in_this_process

    return in_this_process if flags.ray.workers == 1 else in_processes(flags.ray.workers)


def _print_corpus_failures(report: CorpusReport, out: str) -> None:
    for name, reason in report.failed[:20]:
        print(f"failed: {name}: {reason}", file=sys.stderr)
    listed = f"images are listed in {out.rstrip('/')}/.codefend/failures"
    print(f"error: {report.failures} images or files failed and were left out; {listed}", file=sys.stderr)


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
