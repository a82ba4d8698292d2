"""Documents in front of the lane: each is rendered in a worker, one at a time, and its pages go on as images."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from codefend.gateway.documents import rename
from codefend.gateway.errors import Refused
from codefend.gateway.limits import check_count, payload
from codefend.gateway.options import Limits
from codefend.gateway.shapes import Slot, Survey
from codefend.gateway.suspicion import spell
from codefend.gateway.worker import PurifyFailed, Runner


@dataclass
class PageRenderer:
    """Replaces the slots of documents by slots of their pages, which count as images of the request."""

    worker: Runner
    limits: Limits
    executor: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="pages"))

    async def expand(
        self, survey: Survey, cuts: Mapping[str, memoryview], take: Callable[[int], None], timeout_s: float | None
    ) -> Survey:
        """The survey with a slot for each page. ``timeout_s`` includes the wait for other documents. Raises Refused."""
        if all(slot.form != "document" for slot in survey.slots):
            return survey
        slots: list[Slot] = []
        others = sum(slot.form != "document" for slot in survey.slots)
        for slot in survey.slots:
            if slot.form != "document":
                slots.append(slot)
                continue
            pages = sum(slot.form == "page" for slot in slots)
            files = await self._render(slot, cuts, self.limits.max_images - others - pages, timeout_s)
            take(sum(map(len, files)))
            slots += [replace(slot, reference="", form="page", data=file) for file in files]
        check_count(len(slots), self.limits)
        return replace(survey, slots=tuple(slots))

    async def _render(
        self, slot: Slot, cuts: Mapping[str, memoryview], room: int, timeout_s: float | None
    ) -> list[bytes]:
        loop = asyncio.get_running_loop()
        work = loop.run_in_executor(self.executor, self._pages, slot.reference, cuts, room)
        try:
            return await asyncio.wait_for(work, timeout_s)
        except Refused as refusal:
            status, code, message = refusal.status, refusal.code, refusal.message
            raise Refused(status, code, message, where=spell(slot.place)) from refusal
        except (TimeoutError, PurifyFailed) as error:
            if isinstance(error, PurifyFailed) and error.reason != "timeout":
                message = "a document could not be rendered"
                raise Refused(500, "purification_failed", message, where=spell(slot.place)) from error
            message = "a document was not rendered in time"
            raise Refused(503, "purification_timeout", message, where=spell(slot.place), retry_after=1) from error

    def _pages(self, reference: str, cuts: Mapping[str, memoryview], room: int) -> list[bytes]:
        try:
            data = payload(reference, self.limits, cuts=cuts)
        except Refused as refusal:
            raise rename(refusal) from refusal
        return self.worker.pages(data, room)

    def close(self) -> None:
        """End the thread, without waiting for what it does."""
        self.executor.shutdown(wait=False, cancel_futures=True)
