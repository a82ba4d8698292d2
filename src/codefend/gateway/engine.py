"""A request body in, the same body with purified images out; or a refusal. Knows nothing of HTTP."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from codefend.gateway.errors import Api, Refused
from codefend.gateway.excise import Excised, excise, marks
from codefend.gateway.lane import Lane, digest_of
from codefend.gateway.limits import check_count, frames, inspect, payload
from codefend.gateway.options import Limits, Mode, OnError
from codefend.gateway.pages import PageRenderer
from codefend.gateway.rewrite import EncodedImage, PromptWrapper, rebuild, splice
from codefend.gateway.shapes import Inspection, Slot, Survey, survey
from codefend.gateway.suspicion import spell
from codefend.gateway.wire import check_simple, dump, parse
from codefend.gateway.worker import Job, Purified, PurifyFailed, Runner, canary, suspicious
from codefend.prompts.image_text import note
from codefend.purifiers import ocr
from codefend.purifiers.text_policy import TextPolicyName
from codefend.types import CodefendError

Fetch = Callable[..., Awaitable[bytes]]
Take = Callable[[int], None]  # accounts for bytes that a request makes the gateway hold; may raise Refused
Done = TypeVar("Done")

_SMALL = 1 << 16  # bytes of JSON that are read on the event loop: well under a millisecond


@dataclass(frozen=True)
class Terms:
    """What an image must pass: ``threshold`` in the purifier's own score, ``text`` the policy for text in images.

    ``turn`` numbers draws of its noise.
    """

    mode: Mode = "purify"
    threshold: float | None = None
    turn: int = 0
    text: TextPolicyName = "off"

    @classmethod
    def choose(cls, worker: Runner, mode: Mode, threshold: float | None = None, text: TextPolicyName = "off") -> Terms:
        """With the threshold calibrated for the worker's purifier unless one is given.

        Raises CodefendError when ``mode`` needs a threshold and there is none, and for ``text`` without the extra.
        """
        if text != "off":
            ocr.check_installed()
        if threshold is None:
            threshold = worker.threshold
        if mode != "purify" and threshold is None:
            raise CodefendError(
                f"policy {mode} needs a threshold: purifier {worker.name} has no calibrated one "
                "(`codefend calibrate` makes one for the options that its weights were saved with)"
            )
        return cls(mode, threshold, text=text)


@dataclass(frozen=True)
class Outcome:
    """What was done. ``body`` is None when the original bytes can go on as they are."""

    body: Any = None
    images: tuple[Purified, ...] = ()
    bypassed: tuple[str, ...] = ()  # the reason of each image that went on without the purifier
    seconds: float = 0.0
    tokens: tuple[str, ...] = ()  # stand in the body for the images' base64, in order
    stream: bool = False  # the client asked for events


@dataclass(frozen=True)
class Reading:
    """A parsed body and where its images are; ``cuts`` are what marks in their references stand for."""

    body: Any
    survey: Survey
    cuts: Mapping[str, memoryview] = field(default_factory=dict)


@dataclass(frozen=True)
class Caller:
    """On whose behalf images are purified: clients share no cached results."""

    client: str = ""
    take: Take = lambda size: None


def _blocked() -> Refused:
    return Refused(400, "image_blocked", "an image looks tampered with and was blocked")


def refuse_remote() -> Refused:
    message = "remote image URLs are not allowed here; send the image as data:image/...;base64,..."
    return Refused(400, "remote_image_refused", message)


@dataclass
class Engine:
    """``lane`` serves an event loop; without one, ``rewrite_now`` works in the caller's thread.

    ``on_error`` says what happens to a valid image when the purifier is broken: ``block`` refuses the request,
    ``fallback`` uses another purifier, ``pass`` re-encodes the image as it is; ``on_bypass`` is called for the last
    two. A purifier is broken when it fails on a small grey image as well; an image on which it alone fails is refused,
    so that no sender can choose the bypass.

    ``on_image`` is called in the event loop for every image that was purified, re-encoded or found in the cache, once
    for all draws of its noise.
    """

    worker: Runner
    lane: Lane | None = None
    limits: Limits = field(default_factory=Limits)
    terms: Terms = field(default_factory=Terms)
    policy: PromptWrapper | None = None
    everywhere: bool = False
    on_error: OnError = "block"
    fallback: Runner | None = None
    fetch: Fetch | None = None
    inspection: Inspection = field(default_factory=Inspection)
    on_bypass: Callable[[str], None] = lambda reason: None
    on_image: Callable[[Purified], None] = lambda image: None
    executor: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2, thread_name_prefix="prepare"))
    rescuer: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="rescue"))

    def __post_init__(self) -> None:
        self.renderer = PageRenderer(self.limits, self.executor)

    async def rewrite_bytes(
        self, api: Api, raw: bytes, terms: Terms | None = None, caller: Caller | None = None
    ) -> tuple[bytes, Outcome]:
        """Purify the images of a JSON body. Bytes that need no change come back as they are. Raises Refused."""
        start = time.perf_counter()
        reading = await self.read(api, raw)
        outcome = await self._purify_all(reading, terms or self.terms, caller or Caller(), start, spliced=True)
        if outcome.body is None:
            return raw, outcome
        size = len(raw) + sum(len(image.image.data) for image in outcome.images)
        written = await self.aside(size, _write, outcome)
        return written, replace(outcome, body=None, tokens=())

    async def rewrite(
        self, api: Api, body: Any, terms: Terms | None = None, caller: Caller | None = None, *, size: int = 0
    ) -> Outcome:
        """Purify the images of a parsed body; one of a large ``size`` (bytes) is read in a thread. Raises Refused."""
        start = time.perf_counter()
        reading = Reading(body, await self.aside(size, self._survey, api, body))
        return await self._purify_all(reading, terms or self.terms, caller or Caller(), start)

    async def purify_file(self, data: bytes, terms: Terms, caller: Caller) -> Purified:
        """Purify one image file. Raises Refused."""
        return (await self.rewrite_file(data, terms, caller)).images[0]

    async def rewrite_file(self, data: bytes, terms: Terms, caller: Caller) -> Outcome:
        """Purify one image file: the only image of the outcome. Raises Refused."""
        start, loop = time.perf_counter(), asyncio.get_running_loop()
        job, digest = await loop.run_in_executor(self.executor, self._prepare, data, terms)
        image, reason = await self._purify(job, digest, caller.client)
        if terms.mode == "block" and suspicious(image.score, terms.threshold):
            raise _blocked()
        return Outcome(None, (image,), (reason,) if reason else (), time.perf_counter() - start)

    def rewrite_now(self, api: Api, body: Any) -> Outcome:
        """Purify in this thread, without queue, cache and remote images. Raises Refused."""
        start = time.perf_counter()
        slots = self._survey(api, body)
        jobs = [self._local_job(slot) for slot in slots.slots]
        images = []
        for slot, (image, reason) in zip(slots.slots, self._run_now(jobs), strict=True):
            if isinstance(image, Refused):
                raise _at(image, slot)
            images.append((image, reason))
        return self._finish(body, slots, images, self.terms, time.perf_counter() - start)

    def purify_now(self, data: bytes) -> EncodedImage:
        """Purify one image file in this thread. Raises Refused."""
        image, _ = self._run_now([self._job(data, self.terms)])[0]
        if isinstance(image, Refused):
            raise image
        return image.image

    async def read(self, api: Api, raw: bytes) -> Reading:
        """Parse a body and find its images, off the event loop when it is large. Raises Refused."""
        return await self.aside(len(raw), self._read, api, raw)

    async def reencode_all(self, reading: Reading) -> Any:
        """The body with all images re-encoded, not purified. Raises Refused."""
        reading = await self._with_pages(reading, Caller().take)

        def reencode(slot: Slot) -> EncodedImage:
            return self._reencode(self._open(slot, reading.cuts, self.terms)[0]).image

        loop = asyncio.get_running_loop()
        slots = reading.survey.slots
        images = [await loop.run_in_executor(self.rescuer, reencode, slot) for slot in slots]
        return rebuild(reading.body, reading.survey, images)

    def close(self) -> None:
        """End the threads, without waiting for what they do."""
        for executor in (self.executor, self.rescuer):
            executor.shutdown(wait=False, cancel_futures=True)

    async def aside(self, size: int, work: Callable[..., Done], *arguments: Any) -> Done:
        """Run large work in a thread, to keep the event loop responsive."""
        if size <= _SMALL:
            return work(*arguments)
        return await asyncio.get_running_loop().run_in_executor(self.executor, partial(work, *arguments))

    # --- reading ---

    def _read(self, api: Api, raw: bytes) -> Reading:
        excised = excise(raw)
        for _ in range(2):  # the second time only what stands in images is cut out
            if not excised.cuts:
                break
            reading = self._read_excised(api, excised)
            if isinstance(reading, Reading):
                return reading
            excised = excised.put_back(keep=reading)
        check_simple(raw)
        body = parse(raw)
        return Reading(body, self._survey(api, body))

    def _read_excised(self, api: Api, excised: Excised) -> Reading | frozenset[str]:
        """The reading, if every mark stands in an image; else those marks that do: the rest must be put back."""
        check_simple(excised.raw)  # what is put back only adds to it
        try:
            body = parse(excised.raw)
            slots = self._survey(api, body)
        except Refused:  # perhaps because of a mark
            return frozenset()
        references = [slot.reference for slot in slots.slots if not _is_remote(slot)]
        claimed = [mark for reference in references for mark in marks(reference) if mark in excised.cuts]
        return Reading(body, slots, excised.cuts) if len(claimed) == len(excised.cuts) else frozenset(claimed)

    def _survey(self, api: Api, body: Any) -> Survey:
        slots = survey(api, body, self.inspection)
        check_count(len(slots.slots), self.limits)
        return slots

    # --- purifying ---

    async def _purify_all(
        self, reading: Reading, terms: Terms, caller: Caller, start: float, *, spliced: bool = False
    ) -> Outcome:
        reading = await self._with_pages(reading, caller.take)
        images = await _gather([self._one(slot, terms, caller, reading.cuts) for slot in reading.survey.slots])
        seconds = time.perf_counter() - start
        finish = partial(self._finish, reading.body, reading.survey, images, terms, seconds, spliced=spliced)
        return await self.aside(0 if self.policy is None else _SMALL + 1, finish)  # a learned policy runs a model

    async def _with_pages(self, reading: Reading, take: Take) -> Reading:
        """The same with a slot for each page of its documents. Raises Refused."""
        assert self.lane is not None
        survey = await self.renderer.expand(self.lane, reading.survey, reading.cuts, take)
        return replace(reading, survey=survey)

    async def _one(
        self, slot: Slot, terms: Terms, caller: Caller, cuts: Mapping[str, memoryview]
    ) -> tuple[Purified, str]:
        """One image: its bytes, its header, the purifier; and the reason if it went on without."""
        loop = asyncio.get_running_loop()
        try:
            if _is_remote(slot):
                if self.fetch is None:
                    raise refuse_remote()
                data = await self.fetch(slot.reference, caller.client, caller.take)
                job, digest = await loop.run_in_executor(self.executor, self._prepare, data, terms)
            else:
                job, digest = await loop.run_in_executor(self.executor, self._open, slot, cuts, terms)
            return await self._purify(job, digest, caller.client)
        except Refused as refusal:
            raise _at(refusal, slot) from refusal

    def _open(self, slot: Slot, cuts: Mapping[str, memoryview], terms: Terms) -> tuple[Job, str]:
        return self._prepare(slot.data or payload(slot.reference, self.limits, cuts=cuts), terms)

    def _prepare(self, data: bytes, terms: Terms) -> tuple[Job, str]:
        digest = digest_of(data)
        return self._job(data, terms), f"{digest}#{terms.turn}" if terms.turn else digest

    def _job(self, data: bytes, terms: Terms) -> Job:
        header = inspect(data, self.limits)
        count = frames(data, header, self.limits)
        return Job(data, terms.mode, terms.threshold, header.pixels, terms.turn, terms.text, count)

    def _local_job(self, slot: Slot) -> Job:
        try:
            if _is_remote(slot):
                raise refuse_remote()
            return self._job(payload(slot.reference, self.limits), self.terms)
        except Refused as refusal:
            raise _at(refusal, slot) from refusal

    async def _purify(self, job: Job, digest: str, client: str) -> tuple[Purified, str]:
        assert self.lane is not None
        reason = ""
        try:
            image = await self.lane(job, digest, client)
        except PurifyFailed as failure:
            loop, reason = asyncio.get_running_loop(), failure.reason
            image = await loop.run_in_executor(self.rescuer, self._rescue, job, failure)
        if not job.turn:
            self.on_image(image)
        return image, reason

    def _run_now(self, jobs: Sequence[Job]) -> list[tuple[Purified | Refused, str]]:
        return [
            (self._rescue(job, result), result.reason) if isinstance(result, PurifyFailed) else (result, "")
            for job, result in zip(jobs, self.worker.run(jobs), strict=True)
        ]

    def _rescue(self, job: Job, failure: PurifyFailed) -> Purified:
        """What ``on_error`` says. Raises Refused when that is to block, and for an image that alone makes it fail."""
        if self.on_error != "block" and self._is_broken():
            if self.on_error == "pass":
                image = self._reencode(job)
                self.on_bypass(failure.reason)
                return image
            assert self.fallback is not None
            (result,) = self.fallback.run([replace(job, mode="purify")])
            if isinstance(result, Purified):
                self.on_bypass(failure.reason)
                return replace(result, score=None, digest="")  # the score is on another scale than the threshold
        if failure.reason == "timeout":
            wait = max(1.0, self.lane.backlog_s) if self.lane is not None else 1.0
            raise Refused(503, "purification_timeout", str(failure), retry_after=wait)
        raise Refused(500, "purification_failed", f"an image could not be purified: {failure}")

    def _is_broken(self) -> bool:
        """Whether the purifier fails on any image."""
        try:
            (result,) = self.worker.run([canary()])
        except BaseException:  # a SystemExit in a thread of this process, for example
            return True
        return isinstance(result, PurifyFailed)

    def _reencode(self, job: Job) -> Purified:
        """The image without its metadata, not purified. Raises Refused."""
        try:
            return self.worker.reencode(job)
        except PurifyFailed as failure:
            raise Refused(500, "purification_failed", f"an image could not be re-encoded: {failure}") from failure

    def _finish(
        self,
        body: Any,
        slots: Survey,
        results: Sequence[tuple[Purified, str]],
        terms: Terms,
        seconds: float,
        *,
        spliced: bool = False,
    ) -> Outcome:
        images = tuple(image for image, _ in results)
        if terms.mode == "block":
            for slot, image in zip(slots.slots, images, strict=True):
                if suspicious(image.score, terms.threshold):
                    raise _at(_blocked(), slot)
        bypassed = tuple(reason for _, reason in results if reason)
        if not images and not (self.policy and self.everywhere and slots.turns):
            return Outcome(None, seconds=seconds)
        tokens = tuple(f"{secrets.token_hex(16)}.{i}." for i in range(len(images))) if spliced else ()
        encoded = [image.image for image in images]
        if spliced:
            encoded = [replace(image, data=token) for image, token in zip(encoded, tokens, strict=True)]
        notes = [note(image.texts or ()) for image in images] if terms.text == "quote" else ()
        rebuilt = rebuild(body, slots, encoded, policy=self.policy, everywhere=self.everywhere, notes=notes)
        stream = isinstance(body, dict) and bool(body.get("stream"))
        return Outcome(rebuilt, images, bypassed, seconds, tokens, stream)


def _write(outcome: Outcome) -> bytes:
    return splice(dump(outcome.body), outcome.tokens, [image.image for image in outcome.images])


def _is_remote(slot: Slot) -> bool:
    # A bare-base64 slot never holds a colon; whatever has one and is no data URL is an address.
    head = slot.reference[:64].lstrip()
    return head[:5].lower() != "data:" and (slot.form == "url" or ":" in head)


def _at(refusal: Refused, slot: Slot) -> Refused:
    return refusal if refusal.where else refusal.at(spell(slot.place))


async def _gather(work: Sequence[Coroutine[Any, Any, tuple[Purified, str]]]) -> list[tuple[Purified, str]]:
    """Run all at the same time; the first failure cancels the others."""
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
