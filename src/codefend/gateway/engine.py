"""A request body in, the same body with purified images out; or a refusal. Knows nothing of HTTP."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, TypeVar

from codefend.gateway.errors import Api, Refused
from codefend.gateway.excise import Excised, excise, marks
from codefend.gateway.lane import Lane, digest_of
from codefend.gateway.limits import Limits, check_count, inspect, payload
from codefend.gateway.rewrite import Picture, Policy, rebuild
from codefend.gateway.shapes import Slot, Survey, survey
from codefend.gateway.suspicion import spell
from codefend.gateway.wire import dump, parse
from codefend.gateway.worker import Job, Mode, Purified, PurifyFailed, Runner, suspicious
from codefend.types import CodefendError

OnError = Literal["block", "fallback", "pass"]
Fetch = Callable[[str], Awaitable[bytes]]
Done = TypeVar("Done")

_LITTLE = 1 << 16  # bytes of JSON that are read on the event loop: well under a millisecond
_MAX_WHOLE = 16 << 20  # bytes parsed in one go: some 2.5 ms each MB, in which the event loop stands still
_MAX_COMMAS = 1_000_000  # a list of a million numbers holds the interpreter for some 30 ms


@dataclass(frozen=True)
class Terms:
    """What an image must pass. ``threshold`` is in the purifier's own score."""

    mode: Mode = "purify"
    threshold: float | None = None

    @classmethod
    def choose(cls, worker: Runner, mode: Mode, threshold: float | None = None) -> Terms:
        """With the threshold calibrated for the worker's purifier unless one is given.

        Raises CodefendError when ``mode`` needs a threshold and there is none.
        """
        if threshold is None:
            threshold = worker.threshold
        if mode != "purify" and threshold is None:
            raise CodefendError(
                f"policy {mode} needs a threshold: purifier {worker.name} has no calibrated one "
                "(`codefend calibrate` makes one for the options that its weights were saved with)"
            )
        return cls(mode, threshold)


@dataclass(frozen=True)
class Outcome:
    """What was done. ``body`` is None when the original bytes can go on as they are."""

    body: Any = None
    images: tuple[Purified, ...] = ()
    bypassed: tuple[str, ...] = ()  # the reason of each image that went on without the purifier
    seconds: float = 0.0
    tokens: tuple[str, ...] = ()  # stand in the body for the images' base64, in order


@dataclass(frozen=True)
class Reading:
    """A parsed body and where its images are; ``cuts`` are what marks in their references stand for."""

    body: Any
    found: Survey
    cuts: Mapping[str, memoryview] = field(default_factory=dict)


def refuse_remote(reference: str) -> Refused:
    message = "remote image URLs are not allowed here; send the image as data:image/...;base64,..."
    return Refused(400, "remote_image_refused", message)


@dataclass
class Engine:
    """``lane`` serves an event loop; without one, ``rewrite_now`` works in the caller's thread.

    ``on_error`` says what becomes of a good image when the purifier fails: ``block`` refuses the request, ``fallback``
    uses another purifier, ``pass`` re-encodes the picture as it is. ``on_bypass`` hears of the last two.
    """

    worker: Runner
    lane: Lane | None = None
    limits: Limits = field(default_factory=Limits)
    terms: Terms = field(default_factory=Terms)
    policy: Policy | None = None
    everywhere: bool = False
    on_error: OnError = "block"
    fallback: Runner | None = None
    fetch: Fetch | None = None
    image_links: bool = False  # http(s) images in Markdown and HTML pass, as text
    on_bypass: Callable[[str], None] = lambda reason: None
    executor: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2, thread_name_prefix="prepare"))

    async def rewrite_bytes(self, api: Api, raw: bytes, terms: Terms | None = None) -> tuple[bytes, Outcome]:
        """Purify the images of a JSON body. Bytes that need no change come back as they are. Raises Refused."""
        start = time.perf_counter()
        reading = await self._aside(len(raw), self._read, api, raw)
        outcome = await self._purified(reading, terms or self.terms, start, spliced=True)
        if outcome.body is None:
            return raw, outcome
        size = len(raw) + sum(len(image.picture.data) for image in outcome.images)
        written = await self._aside(size, _written, outcome)
        return written, replace(outcome, body=None, tokens=())

    async def rewrite(self, api: Api, body: Any, terms: Terms | None = None) -> Outcome:
        """Purify the images of a parsed body. Raises Refused."""
        start = time.perf_counter()
        return await self._purified(Reading(body, self._survey(api, body)), terms or self.terms, start)

    def rewrite_now(self, api: Api, body: Any) -> Outcome:
        """Purify in this thread, without queue, cache and remote images. Raises Refused."""
        start = time.perf_counter()
        found = self._survey(api, body)
        datas = [self._local(slot) for slot in found.slots]
        done = []
        for slot, (image, reason) in zip(found.slots, self._run_now(datas), strict=True):
            if isinstance(image, Refused):
                raise _at(image, slot)
            done.append((image, reason))
        return self._finish(body, found, done, self.terms, time.perf_counter() - start)

    def picture_now(self, data: bytes) -> Picture:
        """Purify one image file in this thread. Raises Refused."""
        inspect(data, self.limits)
        image, _ = self._run_now([data])[0]
        if isinstance(image, Refused):
            raise image
        return image.picture

    def _run_now(self, datas: Sequence[bytes]) -> list[tuple[Purified | Refused, str]]:
        jobs = [Job(data, self.terms.mode, self.terms.threshold) for data in datas]
        return [
            (self._rescue(job, result), result.reason) if isinstance(result, PurifyFailed) else (result, "")
            for job, result in zip(jobs, self.worker.run(jobs), strict=True)
        ]

    async def _purified(self, reading: Reading, terms: Terms, start: float, *, spliced: bool = False) -> Outcome:
        done = await _all([self._one(slot, terms, reading.cuts) for slot in reading.found.slots])
        seconds = time.perf_counter() - start
        finish = partial(self._finish, reading.body, reading.found, done, terms, seconds, spliced=spliced)
        return await self._aside(_LITTLE + 1 if getattr(self.policy, "slow", False) else 0, finish)

    async def _aside(self, size: int, work: Callable[..., Done], *arguments: Any) -> Done:
        """In a thread when it is much: the event loop can go on between two of Python's own steps."""
        if size <= _LITTLE:
            return work(*arguments)
        return await asyncio.get_running_loop().run_in_executor(self.executor, work, *arguments)

    def _read(self, api: Api, raw: bytes) -> Reading:
        excised = excise(raw)
        for _ in range(2):  # the second time only what stands in images is cut out
            if not excised.cuts:
                break
            reading = self._spared(api, excised)
            if isinstance(reading, Reading):
                return reading
            excised = excised.put_back(keep=reading)
        _check_simple(raw)
        body = parse(raw)
        return Reading(body, self._survey(api, body))

    def _spared(self, api: Api, excised: Excised) -> Reading | frozenset[str]:
        """The reading, if every mark stands in an image; else those marks that do: the rest must be put back."""
        _check_simple(excised.raw)  # what is put back only adds to it
        try:
            body = parse(excised.raw)
            found = self._survey(api, body)
        except Refused:  # perhaps for a mark's sake
            return frozenset()
        references = [slot.reference for slot in found.slots if not _is_remote(slot)]
        claimed = [mark for reference in references for mark in marks(reference) if mark in excised.cuts]
        return Reading(body, found, excised.cuts) if len(claimed) == len(excised.cuts) else frozenset(claimed)

    def _survey(self, api: Api, body: Any) -> Survey:
        found = survey(api, body, image_links=self.image_links)
        check_count(len(found.slots), self.limits)
        return found

    async def _one(self, slot: Slot, terms: Terms, cuts: Mapping[str, memoryview]) -> tuple[Purified, str]:
        """One image: its bytes, its header, the purifier; and the reason if it went on without."""
        try:
            loop = asyncio.get_running_loop()
            if _is_remote(slot):
                if self.fetch is None:
                    raise refuse_remote(slot.reference)
                data = await self.fetch(slot.reference)
                digest = await loop.run_in_executor(self.executor, self._inspect, data)
            else:
                data, digest = await loop.run_in_executor(self.executor, self._open, slot.reference, cuts)
            return await self._purify(Job(data, terms.mode, terms.threshold), digest)
        except Refused as refusal:
            raise _at(refusal, slot) from refusal

    async def _purify(self, job: Job, digest: str) -> tuple[Purified, str]:
        assert self.lane is not None
        try:
            return await self.lane(job, digest), ""
        except PurifyFailed as failure:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self.executor, self._rescue, job, failure), failure.reason

    def _rescue(self, job: Job, failure: PurifyFailed) -> Purified:
        """What ``on_error`` says. Raises Refused when that is to block, or when the fallback fails, too."""
        if self.on_error == "pass":
            image = self.reencoded(job)
            self.on_bypass(failure.reason)
            return image
        if self.on_error == "fallback" and self.fallback is not None:
            result = self.fallback.run([Job(job.data)])[0]
            if isinstance(result, Purified):
                self.on_bypass(failure.reason)
                return replace(result, score=None)  # on another scale than the threshold
        if failure.reason == "timeout":
            raise Refused(503, "purification_timeout", str(failure), retry_after=1)
        raise Refused(500, "purification_failed", f"an image could not be purified: {failure}")

    def reencoded(self, job: Job) -> Purified:
        """The picture without its metadata, not purified. Raises Refused."""
        try:
            return self.worker.reencode(job)
        except PurifyFailed as failure:
            raise Refused(500, "purification_failed", f"an image could not be re-encoded: {failure}") from failure

    def _finish(
        self,
        body: Any,
        found: Survey,
        done: Sequence[tuple[Purified, str]],
        terms: Terms,
        seconds: float,
        *,
        spliced: bool = False,
    ) -> Outcome:
        images = tuple(image for image, _ in done)
        if terms.mode == "block":
            for slot, image in zip(found.slots, images, strict=True):
                if suspicious(image.score, terms.threshold):
                    message = "an image looks tampered with and was blocked"
                    raise _at(Refused(400, "image_blocked", message), slot)
        bypassed = tuple(reason for _, reason in done if reason)
        if not images and not (self.policy and self.everywhere and found.turns):
            return Outcome(None, seconds=seconds)
        tokens = tuple(f"{secrets.token_hex(16)}.{i}." for i in range(len(images))) if spliced else ()
        pictures = [image.picture for image in images]
        if spliced:
            pictures = [replace(picture, data=token) for picture, token in zip(pictures, tokens, strict=True)]
        rebuilt = rebuild(body, found, pictures, policy=self.policy, everywhere=self.everywhere)
        return Outcome(rebuilt, images, bypassed, seconds, tokens)

    def _open(self, reference: str, cuts: Mapping[str, memoryview]) -> tuple[bytes, str]:
        data = payload(reference, self.limits, cuts=cuts)
        return data, self._inspect(data)

    def _inspect(self, data: bytes) -> str:
        inspect(data, self.limits)
        return digest_of(data)

    def _local(self, slot: Slot) -> bytes:
        try:
            if _is_remote(slot):
                raise refuse_remote(slot.reference)
            data = payload(slot.reference, self.limits)
            inspect(data, self.limits)
        except Refused as refusal:
            raise _at(refusal, slot) from refusal
        return data


def _check_simple(raw: bytes) -> None:
    """Refuse (413) what would keep the parser, and with it the event loop, for long."""
    if len(raw) > _MAX_WHOLE:
        raise Refused(413, "body_too_complex", f"the body has more than {_MAX_WHOLE:,} bytes that are no images")
    if raw.count(b",") > _MAX_COMMAS:
        raise Refused(413, "body_too_complex", f"the body has more than {_MAX_COMMAS:,} values")


def _written(outcome: Outcome) -> bytes:
    return splice(dump(outcome.body), outcome.tokens, outcome.images)


def splice(raw: bytes, tokens: Sequence[str], images: Sequence[Purified]) -> bytes:
    """Put base64 where its token stands. A JSON encoder would look at every character of it, on the event loop."""
    marks = [
        (raw.index(token.encode()), len(token), image.picture.data) for token, image in zip(tokens, images, strict=True)
    ]
    pieces, end = [], 0
    for start, length, data in sorted(marks):
        pieces += [raw[end:start], data.encode("ascii")]
        end = start + length
    return b"".join([*pieces, raw[end:]])


def _is_remote(slot: Slot) -> bool:
    # A bare-base64 slot never holds a colon; whatever has one and is no data URL is somebody's address.
    head = slot.reference[:64].lstrip()
    return head[:5].lower() != "data:" and (slot.form == "url" or ":" in head)


def _at(refusal: Refused, slot: Slot) -> Refused:
    return Refused(
        refusal.status,
        refusal.code,
        refusal.message,
        where=refusal.where or spell(slot.place),
        retry_after=refusal.retry_after,
    )


async def _all(work: Sequence[Coroutine[Any, Any, tuple[Purified, str]]]) -> list[tuple[Purified, str]]:
    """Run at once; the first failure cancels the others."""
    if not work:
        return []
    tasks = [asyncio.ensure_future(item) for item in work]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
