"""The verb purify on a corpus: Parquet files, tar archives, URLs, shards and workers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import typer

from codefend.cli.options import ONE_PROCESS, RayFlags, check_engine

if TYPE_CHECKING:
    from codefend.purifiers.corpus import CorpusReport, Engine
    from codefend.purifiers.image_files import FolderOptions


@dataclass(frozen=True)
class CorpusFlags:
    """The flags of `codefend purify` that concern a corpus; see their help."""

    column: str | None = None
    keep_others: bool = False
    shard: str | None = None
    engine: str = "local"
    ray: RayFlags = ONE_PROCESS


def purify_as_corpus(paths: Sequence[str], out: str, options: FolderOptions, flags: CorpusFlags) -> bool:
    """Purify a corpus and print what was done; False, without doing anything, for plain images and folders.

    Raises typer.Exit(1) when images or files failed, and CodefendError as `purify_corpus`.
    """
    from codefend.purifiers.corpus_files import is_corpus

    if flags == CorpusFlags() and not is_corpus(paths, out):
        return False
    from codefend.purifiers.corpus import CorpusOptions, parse_shard, purify_corpus

    shard = parse_shard(flags.shard or "1/1")
    report = purify_corpus(
        paths, out, CorpusOptions(options, flags.column, flags.keep_others, shard), choose_engine(flags)
    )
    skipped = f", {report.skipped} units skipped (purified before)" if report.skipped else ""
    print(f"purified {report.images} images in {report.units} units{skipped} -> {out}")
    if report.failures:
        _print_failures(report)
        raise typer.Exit(1)
    return True


def choose_engine(flags: CorpusFlags) -> Engine:
    """The engine of ``--engine`` and ``--workers``. Raises CodefendError for an unknown one and a missing package."""
    check_engine(flags.engine)
    if flags.engine == "ray":
        from codefend.integrations.ray import RayOptions, on_ray

        return on_ray(RayOptions(*flags.ray))
    from codefend.purifiers.corpus import in_processes, in_this_process

    return in_this_process if flags.ray.workers == 1 else in_processes(flags.ray.workers)


def _print_failures(report: CorpusReport) -> None:
    for name, reason in report.failed[:20]:
        print(f"failed: {name}: {reason}", file=sys.stderr)
    print(
        f"error: {report.failures} images or files failed and were left out; the reasons are in .codefend/manifest",
        file=sys.stderr,
    )
