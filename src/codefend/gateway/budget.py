"""Request bodies, and memory for them: one budget for the process, and a share of it for each client."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from starlette.types import Receive

from codefend.gateway.errors import Refused
from codefend.gateway.options import BudgetOptions


class ClientGone(Exception):
    """The client has closed the connection."""


@dataclass
class Lease:
    """The bytes that one request holds."""

    budget: BodyBudget
    client: str
    size: int = 0

    def take(self, size: int) -> None:
        """Hold ``size`` more bytes. Raises Refused: 503 when all is in use, 429 when the client's share is."""
        self.budget.take(self.client, size)
        self.size += size


class BodyBudget:
    """Counts the bytes that requests hold. Not thread-safe: it belongs to one event loop."""

    def __init__(self, options: BudgetOptions | None = None) -> None:
        self.options = options or BudgetOptions()
        self.used = 0
        self._clients: Counter[str] = Counter()

    @contextmanager
    def lease(self, client: str) -> Iterator[Lease]:
        """Open a lease that gives its bytes back at the end."""
        lease = Lease(self, client)
        try:
            yield lease
        finally:
            self.used -= lease.size
            self._clients[client] -= lease.size
            if self._clients[client] <= 0:
                del self._clients[client]

    def take(self, client: str, size: int) -> None:
        if self.used + size > self.options.total:
            raise Refused(503, "memory_full", "too many large requests at a time", retry_after=2)
        if self._clients[client] + size > self.options.client:
            raise Refused(429, "memory_full", "this client has too many large requests at a time", retry_after=2)
        self.used += size
        self._clients[client] += size


async def read_body(receive: Receive, limit: int, take: Callable[[int], None] = lambda size: None) -> bytes:
    """Read a request's body; ``take`` accounts for its bytes. Raises Refused over ``limit`` bytes, ClientGone."""
    parts: list[bytes] = []
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        part = message.get("body", b"")
        size += len(part)
        if size > limit:
            raise Refused(413, "body_too_large", f"the body is over the limit of {limit:,} bytes")
        take(len(part))
        parts.append(part)
        more = message.get("more_body", False)
    return parts[0] if len(parts) == 1 else b"".join(parts)
