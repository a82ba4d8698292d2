"""Documents are rendered in the lane, and their pages go on as images."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from codefend.gateway.documents import rename
from codefend.gateway.errors import Refused
from codefend.gateway.lane import Lane
from codefend.gateway.limits import check_count, payload
from codefend.gateway.options import Limits
from codefend.gateway.shapes import Slot, Survey
from codefend.gateway.suspicion import spell
from codefend.gateway.worker import PurifyFailed


@dataclass
class PageRenderer:
    """Replaces the slots of documents by slots of their pages, which count as images of the request."""

    limits: Limits
    executor: ThreadPoolExecutor  # decodes base64

    async def expand(
        self, lane: Lane, survey: Survey, cuts: Mapping[str, memoryview], take: Callable[[int], None]
    ) -> Survey:
        """The survey with a slot for each page; ``take`` accounts for their bytes. Raises Refused."""
        if all(slot.form != "document" for slot in survey.slots):
            return survey
        slots: list[Slot] = []
        others = sum(slot.form != "document" for slot in survey.slots)
        for slot in survey.slots:
            if slot.form != "document":
                slots.append(slot)
                continue
            pages = sum(slot.form == "page" for slot in slots)
            files = await self._render(lane, slot, cuts, self.limits.max_images - others - pages)
            take(sum(map(len, files)))
            slots += [replace(slot, reference="", form="page", data=file) for file in files]
        check_count(len(slots), self.limits)
        return replace(survey, slots=tuple(slots))

    async def _render(self, lane: Lane, slot: Slot, cuts: Mapping[str, memoryview], room: int) -> list[bytes]:
        try:
            loop = asyncio.get_running_loop()
            data = await loop.run_in_executor(self.executor, self._read, slot.reference, cuts)
            return await lane.pages(data, room)
        except Refused as refusal:
            raise refusal.at(spell(slot.place)) from refusal
        except PurifyFailed as error:
            if error.reason != "timeout":
                message = "a document could not be rendered"
                raise Refused(500, "purification_failed", message, where=spell(slot.place)) from error
            message, wait = "a document was not rendered in time", max(1.0, lane.backlog_s)
            raise Refused(503, "purification_timeout", message, where=spell(slot.place), retry_after=wait) from error

    def _read(self, reference: str, cuts: Mapping[str, memoryview]) -> bytes:
        try:
            return payload(reference, self.limits, cuts=cuts)
        except Refused as refusal:
            raise rename(refusal) from refusal
