"""File bytes in, purified file bytes out. Synchronous; the lane and the client wrapper call it from threads."""

from __future__ import annotations

import base64
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from codefend.core import images
from codefend.core.devices import device_named
from codefend.gateway.errors import Refused
from codefend.gateway.limits import Limits
from codefend.gateway.rewrite import Picture
from codefend.purifiers.base import Purifier
from codefend.purifiers.tiling import limit_side
from codefend.types import CodefendError

Mode = Literal["purify", "detect", "block"]
Encoding = Literal["auto", "png", "jpeg", "webp"]


class PurifyFailed(Exception):
    """The purifier failed on an image that is fine; what happens now is the operator's ``on_error``."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason  # a word for metrics: "exception", "timeout", "wrong_output", "crashed"

    def __reduce__(self) -> Any:  # it comes out of worker processes
        return PurifyFailed, (self.reason, str(self))


@dataclass(frozen=True)
class Job:
    """One image to purify. ``threshold`` matters to ``detect`` only: below it the picture is re-encoded as it is."""

    data: bytes
    mode: Mode = "purify"
    threshold: float | None = None


@dataclass(frozen=True)
class Purified:
    picture: Picture
    score: float | None = None
    seconds: float = 0.0  # of the purifier, this image's share of the batch
    purified: bool = True  # False: re-encoded only
    cached: bool = False


Result = Purified | Refused | PurifyFailed


def suspicious(score: float | None, threshold: float | None) -> bool:
    """Whether detect replaces and block refuses. What cannot be judged counts: no score, no threshold, nan."""
    return score is None or threshold is None or not score < threshold


class Runner(Protocol):
    """What purifies: a ``Worker`` in this process or a ``Pool`` of them in others."""

    name: str
    threshold: float | None  # calibrated for this purifier's score, if its weights carry one

    def run(self, jobs: Sequence[Job]) -> list[Result]: ...
    def reencode(self, job: Job) -> Purified: ...
    def warm_up(self) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class _Decoded:
    index: int
    pixels: Tensor  # [3, H, W]
    kind: str


class Worker:
    """Decode, purify in batches of equal size, score, encode. Thread-safe: one batch is in the purifier at a time."""

    def __init__(
        self,
        purifier: Purifier,
        *,
        limits: Limits | None = None,
        encoding: Encoding = "auto",
        device: str = "cpu",
        batch_pixels: int = 1_000_000,  # decoded at a time; one image may have more
    ) -> None:
        self.purifier, self.limits, self.encoding = purifier, limits or Limits(), encoding
        self.device, self.batch_pixels = device_named(device, f"device {device}"), batch_pixels
        self.name = purifier.name
        self.threshold = None if purifier.detector is None else purifier.detector.threshold
        self._generator = torch.Generator(self.device).manual_seed(int.from_bytes(os.urandom(7), "big"))
        self._lock = threading.Lock()

    def run(self, jobs: Sequence[Job]) -> list[Result]:
        """Purify every job; an image's failure is in its own place and does not touch the others."""
        results: dict[int, Result] = {}
        waiting: list[_Decoded] = []
        for index, job in enumerate(jobs):
            decoded = self._decode(index, job)
            if isinstance(decoded, _Decoded):
                waiting.append(decoded)
            else:
                results[index] = decoded
            if sum(item.pixels[0].numel() for item in waiting) >= self.batch_pixels:  # hold no more of them decoded
                results |= self._groups(waiting, jobs)
                waiting = []
        results |= self._groups(waiting, jobs)
        return [results[index] for index in range(len(jobs))]

    def _groups(self, waiting: Sequence[_Decoded], jobs: Sequence[Job]) -> dict[int, Result]:
        groups: dict[tuple[int, ...], list[_Decoded]] = {}
        for item in waiting:
            groups.setdefault(tuple(item.pixels.shape), []).append(item)
        return {
            item.index: result
            for group in groups.values()
            for item, result in zip(group, self._purify(group, jobs), strict=True)
        }

    def reencode(self, job: Job) -> Purified:
        """Decode and encode without purifying: metadata and trailing data go, pixels stay. Raises Refused."""
        decoded = self._decode(0, job)
        if not isinstance(decoded, _Decoded):
            raise decoded
        return Purified(self._encode(decoded.pixels, decoded.kind), purified=False)

    def warm_up(self) -> None:
        """Purify one grey picture. Raises PurifyFailed when even that does not work."""
        outcome = self._purify([_Decoded(0, torch.full((3, 64, 64), 0.5), "PNG")], [Job(b"")])[0]
        if not isinstance(outcome, Purified):
            raise outcome

    def close(self) -> None:
        """Nothing to end: it works in its caller's thread."""

    def _decode(self, index: int, job: Job) -> _Decoded | Refused:
        try:
            loaded = images.load(job.data, max_pixels=self.limits.max_pixels, first_frame=self.limits.first_frame)
        except CodefendError as error:
            return Refused(400, "invalid_image", str(error))
        except MemoryError:
            return Refused(413, "image_too_large", "not enough memory to decode the image")
        return _Decoded(index, limit_side(loaded.pixels, self.limits.max_side or None), loaded.format)

    def _purify(self, group: Sequence[_Decoded], jobs: Sequence[Job]) -> Sequence[Result]:
        try:
            batch = group[0].pixels[None] if len(group) == 1 else torch.stack([item.pixels for item in group])
            start = time.perf_counter()
            with self._lock, torch.no_grad():
                purified, scores = self._forward(batch)
            seconds = (time.perf_counter() - start) / len(group)
        except PurifyFailed as error:
            return [error] * len(group)
        except Exception as error:  # of any kind: out of memory, a broken network; one bad image must not fail others
            if len(group) == 1:
                return [PurifyFailed("exception", f"{type(error).__name__} in purifier {self.name}")]
            return [result for item in group for result in self._purify([item], jobs)]
        return [
            self._finish(item, jobs[item.index], purified[i], float(scores[i]), seconds) for i, item in enumerate(group)
        ]

    def _forward(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        images_in = batch.to(self.device)
        purified = self.purifier(images_in, generator=self._generator)
        if purified.shape != images_in.shape or not _finite(purified):
            raise PurifyFailed("wrong_output", f"purifier {self.name} returned nan or {tuple(purified.shape)}")
        scores = self.purifier.judge(images_in, purified)  # its score, without purifying twice
        return purified.cpu(), scores.cpu()

    def _finish(self, item: _Decoded, job: Job, purified: Tensor, score: float, seconds: float) -> Result:
        replace = job.mode != "detect" or suspicious(score, job.threshold)
        try:
            picture = self._encode(purified if replace else item.pixels, item.kind)
        except CodefendError as error:
            return Refused(400, "invalid_image", str(error))
        return Purified(picture, score, seconds, purified=replace)

    def _encode(self, pixels: Tensor, source: str) -> Picture:
        kind = ("JPEG" if source == "JPEG" else "PNG") if self.encoding == "auto" else self.encoding.upper()
        data = images.encode(pixels, kind, quality=95 if kind in ("JPEG", "WEBP") else None)
        return Picture(f"image/{kind.lower()}", base64.b64encode(data).decode("ascii"))


def _finite(images: Tensor) -> bool:
    # nan and infinity both reach an extreme; isfinite would write four tensors of this size on the way.
    low, high = torch.aminmax(images)
    return bool(torch.isfinite(low) & torch.isfinite(high))
