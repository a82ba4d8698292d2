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

import torch
from torch import Generator, Tensor

from codefend.core import images
from codefend.core.devices import default_device
from codefend.core.noise import noise_seed, pixels_digest, secret_of
from codefend.purifiers import text_policy
from codefend.purifiers.base import Purifier
from codefend.purifiers.text_policy import TextPolicyName
from codefend.types import CodefendError


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


def purify_files(purifier: Purifier, files: Sequence[tuple[str, bytes]], options: FolderOptions) -> list[PurifiedFile]:
    """Purify image files given as name and content, grouped by size; a failure is in its own place."""
    results: dict[int, PurifiedFile] = {}
    groups: dict[tuple[int, ...], list[tuple[int, images.LoadedImage]]] = {}
    instructions: dict[int, tuple[str, ...]] = {}
    for index, (name, data) in enumerate(files):
        try:
            loaded = options.load(data, partial(instructions.__setitem__, index))
            groups.setdefault(tuple(loaded.pixels.shape), []).append((index, loaded))
        except CodefendError as error:
            results[index] = PurifiedFile(name, name, error=str(error))
    for group in groups.values():
        results |= _purify_same_size(purifier, files, group, options)
    return [replace(results[index], instructions=instructions.get(index, ())) for index in range(len(files))]


def _purify_same_size(
    purifier: Purifier,
    files: Sequence[tuple[str, bytes]],
    group: Sequence[tuple[int, images.LoadedImage]],
    options: FolderOptions,
) -> dict[int, PurifiedFile]:
    loaded = [image for _, image in group]
    try:
        purified = purify_group(purifier, loaded, options.seed)
    except CodefendError as error:
        return {index: PurifiedFile(files[index][0], files[index][0], error=str(error)) for index, _ in group}
    results = {}
    for (index, image), pixels, score in zip(group, purified, judge_group(purifier, loaded, purified), strict=True):
        name, data = files[index]
        try:
            target = target_name(name, image.format, options.format)
            written = options.encode(image, pixels, images.format_of(target))
            results[index] = PurifiedFile(name, target, written, hashlib.sha256(data).hexdigest(), score)
        except CodefendError as error:
            results[index] = PurifiedFile(name, name, error=str(error))
    return results


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
