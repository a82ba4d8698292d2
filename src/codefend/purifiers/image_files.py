"""One image file in, its purified file out: the step that jobs on folders, tables, archives and clusters share.

The bytes are a function of the image, the weights, the options and the seed alone: noise is keyed by the pixels, so
names, neighbours, shards, retries and engines do not matter. With ``batch`` above 1, deterministic purifiers see
several images of one size per call, which can change a pixel by a level.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Literal

import torch
from torch import Generator, Tensor

from codefend.core import images
from codefend.core.devices import default_device
from codefend.core.overlap import Overlap
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


ImageFile = tuple[str, images.Source]  # name, and content or path


@dataclass(frozen=True)
class ReadFile:
    """An image file as read, or why it was not; ``noise_seed`` is that of its pixels."""

    name: str
    loaded: images.LoadedImage | None = None
    noise_seed: int = 0
    sha256: str = ""  # of the content, where that was given
    instructions: tuple[str, ...] = ()
    error: str = ""


PurifiedPixels = tuple[ReadFile, Tensor | None, float | None]  # pixels ``[3, H, W]`` and detection score, if purified
_SMALL = 16 << 10  # bytes: coding a smaller file takes less than handing it to another thread


class FileSteps:
    """The steps from image files to purified ones; only `purify` needs the network, so the others can overlap with it.

    A failure is in its own place, with its reason.
    """

    def __init__(self, purifier: Purifier, options: FolderOptions) -> None:
        self.purifier, self.options = purifier, options

    def overlapped(self) -> Overlap[Sequence[ImageFile], list[ReadFile], list[PurifiedPixels], list[PurifiedFile]]:
        """The three steps, on more than one call's files at a time."""
        return Overlap(self.read, self.purify, self.write, small=_are_small)

    def read(self, files: Sequence[ImageFile]) -> list[ReadFile]:
        """Read and decode."""
        return [self._read(name, source) for name, source in files]

    def purify(self, files: Sequence[ReadFile]) -> list[PurifiedPixels]:
        """Purified pixels and detection scores; images of one size go together."""
        results: dict[int, PurifiedPixels] = {}
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, file in enumerate(files):
            if file.loaded is None:
                results[index] = file, None, None
            else:
                groups.setdefault(tuple(file.loaded.pixels.shape), []).append(index)
        for group in groups.values():
            loaded = [image for index in group if (image := files[index].loaded) is not None]
            try:
                purified = purify_group(self.purifier, loaded, [files[index].noise_seed for index in group])
            except CodefendError as error:
                results |= {index: (replace(files[index], error=str(error)), None, None) for index in group}
                continue
            scores = judge_group(self.purifier, loaded, purified)
            results |= {i: (files[i], pixels, score) for i, pixels, score in zip(group, purified, scores, strict=True)}
        return [results[index] for index in range(len(files))]

    def write(self, files: Sequence[PurifiedPixels]) -> list[PurifiedFile]:
        """Encode."""
        return [self._written(*file) for file in files]

    def _read(self, name: str, source: images.Source) -> ReadFile:
        instructions: list[str] = []
        try:
            loaded = self.options.load(source, instructions.extend)
        except CodefendError as error:
            return ReadFile(name, instructions=tuple(instructions), error=str(error))
        sha256 = hashlib.sha256(source).hexdigest() if isinstance(source, bytes) else ""
        noise = noise_seed_of(self.purifier, loaded, self.options.seed)
        return ReadFile(name, loaded, noise, sha256, tuple(instructions))

    def _written(self, file: ReadFile, pixels: Tensor | None, score: float | None) -> PurifiedFile:
        if file.loaded is None or pixels is None:
            return PurifiedFile(file.name, file.name, error=file.error, instructions=file.instructions)
        try:
            target = target_name(file.name, file.loaded.format, self.options.format)
            data = self.options.encode(file.loaded, pixels, images.format_of(target))
        except CodefendError as error:
            return PurifiedFile(file.name, file.name, error=str(error), instructions=file.instructions)
        return PurifiedFile(file.name, target, data, file.sha256, score, instructions=file.instructions)


def purify_files(purifier: Purifier, files: Sequence[ImageFile], options: FolderOptions) -> list[PurifiedFile]:
    """Purify image files given as name and content or path; a failure is in its own place."""
    steps = FileSteps(purifier, options)
    return steps.write(steps.purify(steps.read(files)))


def _are_small(files: Sequence[ImageFile]) -> bool:
    return sum(len(source) if isinstance(source, bytes) else _SMALL for _, source in files) < _SMALL


def target_name(name: str, kind: str, ending: str | None = None) -> str:
    """The name of the purified file of an image of format ``kind``: with ``ending``, or its own if it can be written.

    Without a known ending one is appended: ``ending``, that of ``kind``, or .png for a format that is only read.
    """
    path = PurePosixPath(name)
    if ending is not None:
        ending = f".{ending.lstrip('.')}"
        return str(path.with_suffix(ending)) if is_image_name(name) else f"{name}{ending}"
    if path.suffix.lower() in images.READABLE:
        return name if _is_writable(path.suffix) else f"{name}.png"
    return f"{name}.{kind.lower()}" if _is_writable(f".{kind}") else f"{name}.png"


def _is_writable(suffix: str) -> bool:
    try:
        images.format_of(f"x{suffix}")
    except CodefendError:
        return False
    return True


def purify_group(purifier: Purifier, loaded: Sequence[images.LoadedImage], noise_seeds: Sequence[int]) -> Tensor:
    """Purify images of one size ``[B, 3, H, W]`` on the default device, one by one if the purifier draws noise.

    Raises CodefendError when the memory does not suffice, and RuntimeError for a purifier that changes the shape.
    """
    size = 1 if purifier.stochastic else len(loaded)
    parts = [
        purify_batch(purifier, loaded[start : start + size], torch.Generator().manual_seed(noise_seeds[start]))
        for start in range(0, len(loaded), size)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def noise_seed_of(purifier: Purifier, loaded: images.LoadedImage, seed: int) -> int:
    """The seed of the noise for an image: a function of its pixels, the purifier's name and the job's ``seed``."""
    return noise_seed(pixels_digest(secret_of(seed), purifier.name, loaded.pixels))


def purify_batch(purifier: Purifier, loaded: Sequence[images.LoadedImage], generator: Generator) -> Tensor:
    """As `purify_group`, in one call with this noise."""
    batch = loaded[0].pixels[None] if len(loaded) == 1 else torch.stack([image.pixels for image in loaded])
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
    """Whether a file name ends like an image's: also of formats that can only fail, lest they are copied unpurified."""
    return PurePosixPath(name).suffix.lower() in images.READABLE | images.UNSUPPORTED


def kind_of(name: str) -> Kind | None:
    """Archive or table, by the ending of a file's name."""
    lower = name.lower()
    return "tar" if lower.endswith(TARS) else "table" if lower.endswith(TABLES) else None
