"""File bytes in, purified file bytes out. Synchronous; the lane and the client wrapper call it from threads."""

from __future__ import annotations

import base64
import hashlib
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from codefend.core import animations, documents, images
from codefend.core.checkpoints import is_finite
from codefend.core.devices import device_named
from codefend.core.png import drop_damaged_metadata
from codefend.core.seeds import noise_seed, pixels_digest
from codefend.gateway.errors import Refused
from codefend.gateway.limits import check_size
from codefend.gateway.options import Encoding, LaneOptions, Limits, Mode
from codefend.gateway.rewrite import EncodedImage
from codefend.purifiers.base import Purifier
from codefend.types import CodefendError

if TYPE_CHECKING:
    from codefend.purifiers.text_policy import TextPolicyName

WARM_UP_SIDE = 64  # pixels


class PurifyFailed(Exception):
    """The purifier failed on a valid image; what happens next is the operator's ``on_error``."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason  # a word for metrics: "exception", "timeout", "wrong_output", "crashed"

    def __reduce__(self) -> Any:  # worker processes send it
        return PurifyFailed, (self.reason, str(self))


@dataclass(frozen=True)
class Job:
    """One image to purify.

    ``threshold`` matters to ``detect`` only: an image with a lower score is re-encoded as it is. ``pixels`` is the size
    that the header gave, ``frames`` the most that it may have; a decoder that finds others refuses the image. 0:
    not checked. ``turn`` numbers draws of noise for the same image.
    """

    data: bytes
    mode: Mode = "purify"
    threshold: float | None = None
    pixels: int = 0
    turn: int = 0
    text: TextPolicyName = "off"  # what happens to text in the image
    frames: int = 0


@dataclass(frozen=True)
class Purified:
    image: EncodedImage
    score: float | None = None
    seconds: float = 0.0  # of the purifier, this image's share of the batch
    purified: bool = True  # False: re-encoded only
    cached: bool = False
    digest: str = ""  # names the decoded pixels
    texts: tuple[str, ...] | None = None  # lines that read like instructions; None when the image was not read


Result = Purified | Refused | PurifyFailed
Step = tuple[tuple[int, ...], tuple[Result, ...] | None]  # places of jobs; None before the work on them, results after


def suspicious(score: float | None, threshold: float | None) -> bool:
    """Whether detect replaces and block refuses. What cannot be judged counts: no score, no threshold, nan."""
    return score is None or threshold is None or not score < threshold


class Runner(Protocol):
    """What purifies: a ``Worker`` in this process or a ``Pool`` of them in others."""

    name: str
    threshold: float | None  # calibrated for this purifier's score, if its weights carry one
    seconds_per_pixel: float  # measured when it was warmed up; 0 when it was not measured
    weights: str  # digest of the purifier's weights

    def run(self, jobs: Sequence[Job], *, alone: bool = False) -> list[Result]: ...
    def reencode(self, job: Job) -> Purified: ...
    def pages(self, data: bytes, room: int) -> list[bytes]: ...
    def warm_up(self) -> None: ...
    def close(self) -> None: ...


def canary() -> Job:
    """A small grey image, which every working purifier can purify."""
    pixels = torch.full((3, WARM_UP_SIDE, WARM_UP_SIDE), 0.5)
    return Job(images.encode(pixels), pixels=WARM_UP_SIDE**2)


@dataclass(frozen=True)
class _Decoded:
    index: int
    pixels: Tensor  # [3, H, W]
    kind: str
    digest: bytes
    texts: tuple[str, ...] | None = None


@dataclass
class WorkerOptions:
    limits: Limits = field(default_factory=Limits)
    encoding: Encoding = "auto"
    device: str = "cpu"
    batch_pixels: int = LaneOptions.batch_pixels
    secret: bytes = field(default_factory=lambda: secrets.token_bytes(32), repr=False)


class Worker:
    """Decode, purify in batches of equal size, score, encode. Thread-safe: one batch is in the purifier at a time.

    The purifier's noise is a function of the image: its seed is the HMAC-SHA256 of the decoded pixels and of the
    purifier's name under ``secret``. So sending an image again, in whatever file, until noise lets it through (the
    resubmission attack of DiffBreak, NeurIPS 2025) gives the same result every time, in every worker with that secret.
    """

    seconds_per_pixel = 0.0

    def __init__(self, purifier: Purifier, options: WorkerOptions | None = None) -> None:
        self.purifier, self.options = purifier, options or WorkerOptions()
        self.device = device_named(self.options.device, f"device {self.options.device}")
        self.name, self.weights = purifier.name, purifier.weights_digest()
        self.threshold = None if purifier.detector is None else purifier.detector.threshold
        self._lock = threading.Lock()

    def run(self, jobs: Sequence[Job], *, alone: bool = False) -> list[Result]:
        """Purify every job; an image's failure is in its own place and does not touch the others."""
        results: dict[int, Result] = {}
        for places, outcome in self.steps(jobs):
            results |= zip(places, outcome or (), strict=False)
        return [results[index] for index in range(len(jobs))]

    def steps(self, jobs: Sequence[Job]) -> Iterator[Step]:
        """Do the jobs step by step; each step is announced before it starts, so that a crash can be attributed."""
        waiting: list[_Decoded] = []
        for index, job in enumerate(jobs):
            yield (index,), None
            decoded = self._decode(index, job)
            if isinstance(decoded, Refused):
                yield (index,), (decoded,)
                continue
            if isinstance(decoded, animations.Animation):
                yield (index,), (self._purify_frames(decoded, job),)
                continue
            waiting.append(decoded)
            if sum(item.pixels[0].numel() for item in waiting) >= self.options.batch_pixels:  # decode no more of them
                yield from self._groups(waiting, jobs)
                waiting = []
        yield from self._groups(waiting, jobs)

    def _groups(self, waiting: Sequence[_Decoded], jobs: Sequence[Job]) -> Iterator[Step]:
        groups: dict[Any, list[_Decoded]] = {}
        for item in waiting:  # every image of a stochastic purifier has a generator of its own
            groups.setdefault(item.index if self.purifier.stochastic else tuple(item.pixels.shape), []).append(item)
        for group in groups.values():
            places = tuple(item.index for item in group)
            yield places, None
            yield places, tuple(self._purify(group, jobs))

    def reencode(self, job: Job) -> Purified:
        """Decode and encode without purifying: metadata and trailing data go, pixels stay. Raises Refused."""
        decoded = self._decode(0, job)
        if isinstance(decoded, animations.Animation):
            raise _animated()
        if isinstance(decoded, Refused):
            raise decoded
        return Purified(self._encode(decoded.pixels, decoded.kind), purified=False, texts=decoded.texts)

    def pages(self, data: bytes, room: int) -> list[bytes]:
        """Each page of a PDF, ``room`` at most, as a PNG file. Raises Refused."""
        limits = self.options.limits
        side = min(limits.document_side, limits.max_side or limits.document_side)
        try:
            return documents.render_pages(data, max_pages=room, side=side, max_ratio=limits.max_ratio)
        except CodefendError as error:
            raise Refused(400, "invalid_document", str(error)) from error
        except MemoryError as error:
            raise Refused(413, "document_too_large", "not enough memory to render the document") from error

    def warm_up(self) -> None:
        """Purify a small grey image. Raises PurifyFailed when even that does not work."""
        (result,) = self.run([canary()])
        if isinstance(result, PurifyFailed):
            raise result

    def measure(self) -> float:
        """Seconds per pixel, of an image of 512 pixels a side; on CPUs as if nothing else was running."""
        clock = time.process_time if self.device.type == "cpu" else time.perf_counter
        pixels = torch.full((3, 512, 512), 0.5)
        job = Job(images.encode(pixels))
        self.run([job])  # allocations and lazy compilation are no part of it
        start = clock()
        self.run([job])
        return (clock() - start) / pixels[0].numel()

    def close(self) -> None:
        """Nothing to end: it works in its caller's thread."""

    def _decode(self, index: int, job: Job) -> _Decoded | animations.Animation | Refused:
        limits = self.options.limits
        try:
            data = drop_damaged_metadata(job.data)
            header = images.probe(data, max_pixels=limits.max_pixels)
            if job.pixels and header.width * header.height != job.pixels:
                raise Refused(400, "invalid_image", "the image's header contradicts itself")
            check_size(header.width, header.height, limits)
            if header.animated and not limits.first_frame:
                return self._open_animation(data, header.format, job.frames)
            loaded = images.load(
                data, max_pixels=limits.max_pixels, first_frame=limits.first_frame, max_side=limits.max_side
            )
        except (Refused, CodefendError, MemoryError) as error:
            return _refusal(error)
        return self._read(index, loaded, job)

    def _open_animation(self, data: bytes, kind: str, most: int) -> animations.Animation:
        """Raises Refused and CodefendError."""
        if not self.options.limits.all_frames or kind not in animations.KINDS:
            raise _animated()
        animation = animations.Animation(data, max_pixels=self.options.limits.max_pixels)
        if most and animation.count > most:
            raise Refused(400, "invalid_image", "the image contradicts itself about its frames")
        return animation

    def _read(self, index: int, loaded: images.LoadedImage, job: Job) -> _Decoded | Refused:
        pixels, texts = loaded.pixels, None
        if job.text != "off":
            read = _read_text(pixels, job.text)
            if isinstance(read, Refused):
                return read
            pixels, texts = read
        name = f"{self.name}#{job.turn}" if job.turn else self.name
        digest = pixels_digest(self.options.secret, name, pixels)
        return _Decoded(index, pixels, loaded.format, digest, texts)

    def _purify_frames(self, animation: animations.Animation, job: Job) -> Result:
        """Purify each frame as a still image; the highest score counts. One bad frame refuses the whole image."""
        items, before, after, scores, durations, seconds = [], [], [], [], [], 0.0
        try:
            for loaded, duration in animation.frames(max_side=self.options.limits.max_side):
                item = self._read(0, loaded, job)
                if isinstance(item, Refused):
                    return item
                purified, score, spent = self._timed([item])
                if job.mode == "detect":  # alone may send the originals on
                    before.append(animations.levels(item.pixels))
                after.append(animations.levels(purified[0]))
                items.append((item.digest, item.texts or ()))
                scores.append(score)
                durations.append(duration)
                seconds += spent
            highest = float(torch.cat(scores).max())
            replace = job.mode != "detect" or suspicious(highest, job.threshold)
            quality = 95 if self.options.encoding in ("jpeg", "webp") else None
            data = animations.encode(after if replace else before, durations, animation.loop, quality=quality)
        except PurifyFailed as failure:
            return failure
        except (CodefendError, MemoryError) as error:
            return _refusal(error)
        image = EncodedImage("image/webp", base64.b64encode(data).decode("ascii"))
        shown = repr(([digest for digest, _ in items], durations, animation.loop))
        texts = None if job.text == "off" else tuple(dict.fromkeys(line for _, lines in items for line in lines))
        name = hashlib.sha256(shown.encode()).hexdigest()
        return Purified(image, highest, seconds, purified=replace, digest=name, texts=texts)

    def _purify(self, group: Sequence[_Decoded], jobs: Sequence[Job]) -> Sequence[Result]:
        try:
            purified, scores, seconds = self._timed(group)
        except PurifyFailed as error:
            if len(group) == 1 or error.reason != "exception":
                return [error] * len(group)
            return [result for item in group for result in self._purify([item], jobs)]  # one must not fail the others
        return [
            self._finish(item, jobs[item.index], purified[i], float(scores[i]), seconds) for i, item in enumerate(group)
        ]

    def _timed(self, group: Sequence[_Decoded]) -> tuple[Tensor, Tensor, float]:
        """Purified images, their scores, and seconds for each. Raises PurifyFailed."""
        try:
            batch = group[0].pixels[None] if len(group) == 1 else torch.stack([item.pixels for item in group])
            start = time.perf_counter()
            with self._lock, torch.no_grad():
                purified, scores = self._forward(batch, noise_seed(group[0].digest))
            return purified, scores, (time.perf_counter() - start) / len(group)
        except PurifyFailed:
            raise
        except Exception as error:  # of any kind: out of memory, a broken network
            raise PurifyFailed("exception", f"{type(error).__name__} in purifier {self.name}") from error

    def _forward(self, batch: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        def generator() -> torch.Generator:
            return torch.Generator(self.device).manual_seed(seed)

        inputs = batch.to(self.device)
        purified = self.purifier(inputs, generator=generator())
        if purified.shape != inputs.shape or not is_finite(purified):
            raise PurifyFailed("wrong_output", f"purifier {self.name} returned nan or {tuple(purified.shape)}")
        if self.purifier.gate or self.purifier.guidance is not None:  # judges another image than it returns
            scores = self.purifier.score(inputs, generator=generator())
        else:
            scores = self.purifier.judge(inputs, purified)  # its score, without purifying twice
        return purified.cpu(), scores.cpu()

    def _finish(self, item: _Decoded, job: Job, purified: Tensor, score: float, seconds: float) -> Result:
        replace = job.mode != "detect" or suspicious(score, job.threshold)
        try:
            image = self._encode(purified if replace else item.pixels, item.kind)
        except CodefendError as error:
            return Refused(400, "invalid_image", str(error))
        return Purified(image, score, seconds, purified=replace, digest=item.digest.hex(), texts=item.texts)

    def _encode(self, pixels: Tensor, source: str) -> EncodedImage:
        encoding = self.options.encoding
        kind = ("JPEG" if source == "JPEG" else "PNG") if encoding == "auto" else encoding.upper()
        data = images.encode(pixels, kind, quality=95 if kind in ("JPEG", "WEBP") else None)
        return EncodedImage(f"image/{kind.lower()}", base64.b64encode(data).decode("ascii"))


def _animated() -> Refused:
    return Refused(400, "animated_image", "animated or of several pages; send one still image")


def _refusal(error: Refused | CodefendError | MemoryError) -> Refused:
    if isinstance(error, Refused):
        return error
    if isinstance(error, CodefendError):
        return Refused(400, "invalid_image", str(error))
    return Refused(413, "image_too_large", "not enough memory to decode the image")


def _read_text(pixels: Tensor, policy: TextPolicyName) -> tuple[Tensor, tuple[str, ...]] | Refused:
    """The pixels under a text policy and the lines that read like instructions. Any failure is a refusal."""
    from codefend.purifiers import text_policy  # a library of its own, which most gateways do not need

    try:
        read, regions = text_policy.apply(pixels, policy)
    except text_policy.TextBlocked:
        return Refused(400, "image_text_blocked", "an image holds text that reads like instructions and was blocked")
    except Exception as error:
        return Refused(500, "text_not_read", f"the text of an image could not be read ({type(error).__name__})")
    return read, text_policy.instructions_in(regions)
