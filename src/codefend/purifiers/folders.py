"""Purify files and folders, one image at a time or in batches; resumable, and unreadable files don't stop the rest."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from codefend.core import documents, images
from codefend.core.files import write_atomic
from codefend.core.progress import progress
from codefend.core.runs import Run, open_run, read_config
from codefend.core.seeds import make_generator
from codefend.purifiers.base import Purifier
from codefend.purifiers.image_files import (
    FileSteps,
    FolderOptions,
    PurifiedFile,
    is_image_name,
    purify_batch,
    target_name,
)
from codefend.types import CodefendError

__all__ = ["MANIFEST", "FolderOptions", "FolderReport", "ImageJob", "plan", "purify_paths"]

MAX_PAGES = 1000  # of a PDF file
PAGE_SIDE = 2048  # pixels; longer side of a page, unless ``max_side`` says otherwise
MANIFEST = ".codefend"  # the run folder kept inside the output folder


@dataclass(frozen=True)
class ImageJob:
    """One file: its source, its target, and its name relative to the source folder."""

    source: Path
    target: Path
    name: str

    def stamp(self) -> str:
        """Name, size and time of the source: a changed image is purified again."""
        try:
            stat = self.source.stat()
        except OSError:  # a broken link, which fails when it is read
            return self.name
        return f"{self.name} {stat.st_size} {stat.st_mtime_ns}"


@dataclass
class FolderReport:
    done: int = 0
    skipped: int = 0  # purified by an earlier run of the same command
    failed: list[tuple[str, str]] = field(default_factory=list)  # name, reason
    instructions: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)  # name, lines of text in the image

    def add_instructions(self, name: str, lines: tuple[str, ...]) -> None:
        self.instructions.append((name, lines))


def purify_paths(
    load_purifier: Callable[[], Purifier], paths: Sequence[str | Path], out: str | Path, options: FolderOptions
) -> FolderReport:
    """Purify images and folders of them into ``out``: an image file for a single file, else a folder.

    A PDF file in ``paths`` counts as the images of its pages. The purifier is loaded last, after the cheap checks.
    Raises CodefendError for a missing or unreadable path, an output that exists, an output folder with other options,
    and for a single file that fails.
    """
    with TemporaryDirectory(prefix="codefend-") as folder:
        with _readable_paths():
            for path in map(Path, paths):
                if not path.exists():
                    raise CodefendError(f"no such file or folder: {path}")
            sources = [page for path in map(Path, paths) for page in _pages(path, Path(folder), options)]
        if len(paths) == 1 and len(sources) > 1 and Path(out).suffix.lower() in images.READABLE:
            raise CodefendError(f"{paths[0]} has {len(sources)} pages; name a folder for them, not {out}")
        return _purify_sources(load_purifier, sources, out, options)


def _pages(source: Path, folder: Path, options: FolderOptions) -> list[Path]:
    """``source``, or where it is a PDF file a PNG file in ``folder`` for each page, of the PDF's age."""
    if source.suffix.lower() != ".pdf" or not source.is_file():
        return [source]
    side = options.max_side or PAGE_SIDE
    try:
        pages = documents.render_pages(source.read_bytes(), max_pages=MAX_PAGES, side=side)
    except CodefendError as error:
        raise CodefendError(f"{source}: {error}") from error
    place = folder / str(len(list(folder.iterdir())))
    place.mkdir()
    files = [place / f"{source.stem}-{number:03}.png" for number in range(1, len(pages) + 1)]
    for file, page in zip(files, pages, strict=True):
        file.write_bytes(page)
        os.utime(file, ns=(source.stat().st_mtime_ns,) * 2)  # so that a rerun finds its own output
    return files


def _purify_sources(
    load_purifier: Callable[[], Purifier], sources: Sequence[Path], out: str | Path, options: FolderOptions
) -> FolderReport:
    target, report = Path(out), FolderReport()
    with _readable_paths():
        to_file = bool(target.suffix) and not target.is_dir() and not str(out).endswith(("/", os.sep))
        alone = to_file and len(sources) == 1 and not sources[0].is_dir()
        if to_file and not alone and is_image_name(out):
            raise CodefendError(f"{out} names one image file; name a folder for the purified images")
        jobs = [] if alone else plan(sources, target, ending=options.format, failed=report.failed)
    if alone:
        return _purify_one(load_purifier, sources[0], target, options)
    with _open_manifest(target, options) as run:
        return _purify_all(load_purifier, jobs, run, options, report)


@contextmanager
def _readable_paths() -> Iterator[None]:
    """Raise errors of the file system (permissions, a name too long) as CodefendError."""
    try:
        yield
    except OSError as error:
        raise CodefendError(f"cannot use {error.filename}: {error.strerror or error}") from error


# --- planning --------------------------------------------------------------------------------------------------------


def plan(
    sources: Sequence[Path], out: Path, *, ending: str | None = None, failed: list[tuple[str, str]] | None = None
) -> list[ImageJob]:
    """List the jobs for files and folders, in a fixed order; folders keep their inner paths below ``out``.

    Skipped folders are added to ``failed`` with the reason. Raises CodefendError when there is nothing to do, an input
    is its own output, or two inputs have the same output.
    """
    failed = [] if failed is None else failed
    if out.exists() and not out.is_dir():
        raise CodefendError(f"{out} is a file; name a folder for the purified images")
    if ending is not None:
        images.format_of(f"x.{ending.lstrip('.')}")
    jobs: dict[Path, ImageJob] = {}
    for source, name in _find_images(sources, os.path.realpath(out), failed):
        target = out / target_name(name.as_posix(), "PNG", ending)
        job = ImageJob(source, target, name.as_posix())
        if os.path.realpath(source) == os.path.realpath(target):
            raise CodefendError(f"{source} would be overwritten by its own output; choose another folder")
        if os.path.realpath(jobs.setdefault(target, job).source) != os.path.realpath(source):
            raise CodefendError(f"{jobs[target].source} and {source} would both be written to {target}")
    if not jobs and failed:
        raise CodefendError("; ".join(f"{name}: {reason}" for name, reason in failed[:5]))
    if not jobs:
        kinds = " ".join(sorted(images.READABLE))
        raise CodefendError(f"no images in {', '.join(map(str, sources))}; looked for {kinds}")
    return list(jobs.values())


def _find_images(sources: Sequence[Path], out: str, failed: list[tuple[str, str]]) -> Iterator[tuple[Path, Path]]:
    def unreadable(error: OSError) -> None:
        failed.append((str(error.filename), f"cannot look into this folder: {error.strerror}"))

    for source in sources:
        if not source.is_dir():
            yield source, Path(source.name)
            continue
        for folder, inner, files in os.walk(source, onerror=unreadable):
            here = Path(folder)
            inner[:] = sorted(name for name in inner if name[0] != "." and os.path.realpath(here / name) != out)
            links = [str(here / name) for name in inner if os.path.islink(here / name)]
            failed.extend((link, "a link to a folder is not followed; name the folder itself") for link in links)
            for name in sorted(files):
                if name[0] != "." and is_image_name(name):
                    yield here / name, (here / name).relative_to(source)


def _open_manifest(out: Path, options: FolderOptions) -> Run:
    folder, config = out / MANIFEST, options.fingerprint()
    with _readable_paths():
        saved = read_config(folder) if (folder / "config.json").exists() else config
        if saved.get("layout") == "corpus" and not options.overwrite:
            raise CodefendError(f"{out} was written as a corpus, with --workers, --shard or the like; use them again")
        if options.overwrite and saved != config:
            for name in ("rows.jsonl", "config.json"):  # in this order: rows without a config are an error
                (folder / name).unlink(missing_ok=True)
        return open_run(folder, config)


# --- purifying -------------------------------------------------------------------------------------------------------


def _purify_one(
    load_purifier: Callable[[], Purifier], source: Path, target: Path, options: FolderOptions
) -> FolderReport:
    kind = images.format_of(target)
    if options.format is not None and images.format_of(f"x.{options.format.lstrip('.')}") != kind:
        raise CodefendError(f"--format {options.format} and the name {target} differ; leave --format out")
    if target.exists() and not options.overwrite:
        raise CodefendError(f"{target} exists already; use --overwrite to replace it")
    report = FolderReport(done=1)
    loaded = options.load(source, partial(report.add_instructions, source.name))
    noise = make_generator(options.seed, "purify", source.name)  # by name, as ever; in folders by the pixels
    pixels = purify_batch(load_purifier(), [loaded], noise)[0]
    write_atomic(target, options.encode(loaded, pixels, kind))
    return report


def _purify_all(
    load_purifier: Callable[[], Purifier],
    jobs: Sequence[ImageJob],
    run: Run,
    options: FolderOptions,
    report: FolderReport,
) -> FolderReport:
    done = _finished_jobs(jobs, run, options)
    report.skipped = len(done)
    if len(done) == len(jobs):
        return report
    steps = FileSteps(load_purifier(), options)
    # A chunk that is partly done is purified whole: pixels depend on the size of a call, by rounding.
    chunks = [jobs[start : start + options.batch] for start in range(0, len(jobs), options.batch)]
    chunks = [chunk for chunk in chunks if not done.issuperset(chunk)]
    with (
        progress("purify", len(jobs), done=len(done)) as advance,
        steps.overlapped() as files,
    ):
        results = files.run([(job.name, job.source) for job in chunk] for chunk in chunks)
        for chunk, purified in zip(chunks, results, strict=True):
            todo = [(job, file) for job, file in zip(chunk, purified, strict=True) if job not in done]
            for job, file in todo:
                _write(job, file, run, report)
            advance(len(todo), chunk[-1].name)
    return report


def _finished_jobs(jobs: Sequence[ImageJob], run: Run, options: FolderOptions) -> set[ImageJob]:
    """The jobs whose output this command wrote for the current source.

    Raises CodefendError for an output written otherwise, unless it may be overwritten.
    """
    rows = run.rows()
    ours = {(row["name"], row["digest"]) for row in rows}
    current = {(row["source"], row["digest"]) for row in rows}
    digests = {job: _digest_of(job.target) for job in jobs if os.path.exists(job.target)}  # False for overlong names
    foreign = [job.target for job, digest in digests.items() if (job.name, digest) not in ours]
    if foreign and not options.overwrite:
        more = f" (and {len(foreign) - 1} more)" if len(foreign) > 1 else ""
        raise CodefendError(f"{foreign[0]} exists already{more}; use --overwrite to replace, or another folder")
    return {job for job, digest in digests.items() if (job.stamp(), digest) in current}


def _write(job: ImageJob, file: PurifiedFile, run: Run, report: FolderReport) -> None:
    if file.instructions:
        report.add_instructions(job.name, file.instructions)
    if file.error:
        report.failed.append((job.name, file.error))
        return
    source, digest = job.stamp(), _digest(file.data)
    # The row comes first: a kill in between must not leave a file without a row, which a rerun would refuse.
    row = {"key": f"{source} {digest}", "source": source, "name": job.name, "digest": digest}
    run.append({**row, "score": file.score})
    try:
        write_atomic(job.target, file.data)
    except CodefendError as error:
        report.failed.append((job.name, str(error)))
        return
    report.done += 1


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


def _digest_of(path: Path) -> str:
    try:
        return _digest(path.read_bytes())
    except OSError as error:
        raise CodefendError(f"cannot read {path}: {error.strerror or error}") from error
