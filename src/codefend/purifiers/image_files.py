"""One image file in, its purified file out: the step that jobs on folders, tables, archives and clusters share.

The bytes are a function of the image, the weights, the options and the seed alone: noise is keyed by the pixels, so
names, neighbours, shards, retries and engines do not matter. With ``batch`` above 1, deterministic purifiers see
several images of one size per call, which can change a pixel by a level.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

import torch
from torch import Generator, Tensor

from codefend.core import images
from codefend.core.devices import default_device
from codefend.core.seeds import noise_seed, pixels_digest, secret_of
from codefend.purifiers import text_policy
from codefend.purifiers.base import Purifier
from codefend.purifiers.text_policy import TextPolicyName
from codefend.types import CodefendError

TARS = (".tar", ".tar.gz", ".tgz")
TABLES = (".parquet",)

Kind = Literal["tar", "table", "group"]  # of a unit of a corpus


@dataclass(frozen=True)
class FolderOptions:
    """How to read, purify and write. ``purifier`` is its name: two purifiers never write into one folder."""

    purifier: str = "bridge"
    seed: int = 0
    batch: int = 1  # images of one size per call
    max_pixels: int = images.MAX_PIXELS
    first_frame: bool = False
    flatten: bool = False  # write opaque images: an alpha channel is copied unpurified, so it could carry an attack
    format: str | None = None  # file name ending such as "png"; None keeps that of each file
    quality: int | None = None  # 1-100 for JPEG and WebP
    overwrite: bool = False
    max_side: int | None = None  # longer side, pixels: larger images are shrunk first, and stay so
    text: TextPolicyName = "off"  # what happens to text in the images, before they are purified

    def fingerprint(self) -> dict[str, object]:
        """The settings that decide the written pixels."""
        names = ("purifier", "seed", "batch", "flatten", "format", "quality")
        shrink = {} if self.max_side is None else {"max_side": self.max_side}
        text = {} if self.text == "off" else {"text": self.text}
        return {**{name: getattr(self, name) for name in names}, **shrink, **text}

    def load(
        self, source: images.Source, on_instructions: Callable[[tuple[str, ...]], None] = lambda lines: None
    ) -> images.LoadedImage:
        """Read an image with these options; ``on_instructions`` is given the lines of text that read like them.

        Raises CodefendError as `images.load`, and `text_policy.TextBlocked`.
        """
        loaded = images.load(
            source, max_pixels=self.max_pixels, first_frame=self.first_frame, max_side=self.max_side or 0
        )
        if self.text == "off":
            return loaded
        pixels, regions = text_policy.apply(loaded.pixels, self.text)
        if lines := text_policy.instructions_in(regions):
            on_instructions(lines)
        return replace(loaded, pixels=pixels)

    def encode(self, loaded: images.LoadedImage, pixels: Tensor, kind: str) -> bytes:
        """Write purified ``[3, H, W]`` as ``kind``, with the transparency and colour profile of ``loaded``."""
        image = pixels if self.flatten else loaded.recombine(pixels)
        return images.encode(image, kind, quality=self.quality, icc=loaded.icc)


class PurifiedImage(NamedTuple):
    """An image as read, its purified pixels ``[3, H, W]``, and its detection score."""

    loaded: images.LoadedImage
    pixels: Tensor
    score: float


@dataclass(frozen=True)
class PurifiedFile:
    """``data`` is empty for an image that could not be purified; ``error`` says why."""

    name: str  # of the source
    target: str  # its name with the ending of the written format
    data: bytes = b""
    source_sha256: str = ""
    score: float | None = None
    error: str = ""
    instructions: tuple[str, ...] = ()  # lines of text in the image that read like them, with a text policy

    def record(self) -> dict[str, object]:
        """The line of a manifest: names, the SHA-256 of both files, the detection score, instructions."""
        output = hashlib.sha256(self.data).hexdigest()
        names = {"name": self.name} if self.target == self.name else {"name": self.name, "target": self.target}
        text = {"instructions": self.instructions} if self.instructions else {}
        return {**names, "source": self.source_sha256, "output": output, "score": self.score, **text}


def purify_files(purifier: Purifier, files: Sequence[tuple[str, bytes]], options: FolderOptions) -> list[PurifiedFile]:
    """Purify image files given as name and content, grouped by size; a failure is in its own place."""
    instructions: dict[int, tuple[str, ...]] = {}
    results = purify_sources(purifier, [data for _, data in files], options, instructions.__setitem__)
    return [
        replace(_encoded(name, data, result, options), instructions=instructions.get(index, ()))
        for index, ((name, data), result) in enumerate(zip(files, results, strict=True))
    ]


def _encoded(name: str, data: bytes, result: PurifiedImage | CodefendError, options: FolderOptions) -> PurifiedFile:
    if isinstance(result, CodefendError):
        return PurifiedFile(name, name, error=str(result))
    try:
        target = target_name(name, result.loaded.format, options.format)
        written = options.encode(result.loaded, result.pixels, images.format_of(target))
    except CodefendError as error:
        return PurifiedFile(name, name, error=str(error))
    return PurifiedFile(name, target, written, hashlib.sha256(data).hexdigest(), result.score)


def purify_sources(
    purifier: Purifier,
    sources: Sequence[images.Source],
    options: FolderOptions,
    on_instructions: Callable[[int, tuple[str, ...]], None],
) -> list[PurifiedImage | CodefendError]:
    """Read and purify images, grouped by size: for each the result or why there is none.

    ``on_instructions`` is given the index of an image and the lines of its text that read like instructions.
    """
    results: dict[int, PurifiedImage | CodefendError] = {}
    groups: dict[tuple[int, ...], dict[int, images.LoadedImage]] = {}
    for index, source in enumerate(sources):
        try:
            loaded = options.load(source, partial(on_instructions, index))
            groups.setdefault(tuple(loaded.pixels.shape), {})[index] = loaded
        except CodefendError as error:
            results[index] = error
    for group in groups.values():
        try:
            purified = purify_group(purifier, list(group.values()), options.seed)
        except CodefendError as error:
            results |= dict.fromkeys(group, error)
            continue
        scores = judge_group(purifier, list(group.values()), purified)
        for (index, loaded), pixels, score in zip(group.items(), purified, scores, strict=True):
            results[index] = PurifiedImage(loaded, pixels, score)
    return [results[index] for index in range(len(sources))]


def target_name(name: str, kind: str, ending: str | None = None) -> str:
    """The name of the purified file of an image of format ``kind``: with ``ending``, or its own if it can be written.

    Without a known ending one is appended: that of ``kind``, or .png for a format that is only read.
    """
    path = PurePosixPath(name)
    if ending is not None:
        return str(path.with_suffix(f".{ending.lstrip('.')}"))
    if is_image_name(name):
        return name if _is_writable(path.suffix) else f"{name}.png"
    return f"{name}.{kind.lower()}" if _is_writable(f".{kind}") else f"{name}.png"


def _is_writable(suffix: str) -> bool:
    try:
        images.format_of(f"x{suffix}")
    except CodefendError:
        return False
    return True


def purify_group(purifier: Purifier, loaded: Sequence[images.LoadedImage], seed: int) -> Tensor:
    """Purify images of one size ``[B, 3, H, W]`` on the default device, one by one if the purifier draws noise.

    Raises CodefendError when the memory does not suffice, and RuntimeError for a purifier that changes the shape.
    """
    parts = [[image] for image in loaded] if purifier.stochastic else [loaded]
    return torch.cat([purify_batch(purifier, part, _noise(purifier, part[0], seed)) for part in parts])


def _noise(purifier: Purifier, loaded: images.LoadedImage, seed: int) -> Generator:
    digest = pixels_digest(secret_of(seed), purifier.name, loaded.pixels)
    return torch.Generator().manual_seed(noise_seed(digest))


def purify_batch(purifier: Purifier, loaded: Sequence[images.LoadedImage], generator: Generator) -> Tensor:
    """As `purify_group`, in one call with this noise."""
    batch = torch.stack([image.pixels for image in loaded])
    try:
        with torch.no_grad():
            results = purifier(batch.to(default_device()), generator=generator).cpu()
    except (RuntimeError, MemoryError) as error:
        if "memory" not in str(error) and not isinstance(error, MemoryError):
            raise
        raise CodefendError(f"not enough memory to purify {batch.shape[3]}x{batch.shape[2]} pixels") from error
    if results.shape != batch.shape:
        raise RuntimeError(f"the purifier changed the shape from {tuple(batch.shape)} to {tuple(results.shape)}")
    return results


def judge_group(purifier: Purifier, loaded: Sequence[images.LoadedImage], purified: Tensor) -> list[float]:
    """The detection score of each image."""
    with torch.no_grad():
        batch = torch.stack([image.pixels for image in loaded]).to(default_device())
        scores: list[float] = purifier.judge(batch, purified.to(batch.device)).tolist()
    return scores


def is_image_name(name: str | Path) -> bool:
    """Whether a file name has the ending of a format that is read."""
    return PurePosixPath(name).suffix.lower() in images.READABLE


def kind_of(name: str) -> Kind | None:
    """Archive or table, by the ending of a file's name."""
    lower = name.lower()
    return "tar" if lower.endswith(TARS) else "table" if lower.endswith(TABLES) else None


def is_corpus(paths: Sequence[str], out: str) -> bool:
    """Whether purifying needs `codefend.purifiers.corpus`: a URL, an archive or a table, or a folder that holds one."""
    if any("://" in path or "::" in path for path in (*paths, out)):
        return True
    return any(kind_of(path) or _holds_units(Path(path)) for path in paths)


def _holds_units(folder: Path) -> bool:
    return folder.is_dir() and any(kind_of(path.name) for path in folder.rglob("*"))
