"""Memory for request bodies: one budget for the process, and a share of it for each client."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from codefend.gateway.errors import Refused
from codefend.gateway.options import BudgetOptions


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
