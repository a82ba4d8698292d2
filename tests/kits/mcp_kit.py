"""The two ends of an MCP proxy in this process: an official client, and any server, with what passes recorded."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import anyio
from mcp import Client
from mcp.shared.message import SessionMessage
from mcp_types import jsonrpc_message_adapter

from codefend.gateway.engine import Engine
from codefend.gateway.local import local_engine
from codefend.gateway.options import LaneOptions, Limits
from codefend.integrations.mcp.proxy import Proxy
from codefend.integrations.mcp.upstream import CommandServer, Upstream
from gateway_kit import Invert

MAX_BYTES = 8 << 20
SERVER = [sys.executable, str(Path(__file__).with_name("mcp_server.py"))]


def engine(purifier: Any = None, **limits: Any) -> Engine:
    return local_engine(purifier or Invert(), limits=Limits(**limits), lane=LaneOptions(workers=1))


@dataclass
class Wire:
    """The client's end. The official client speaks through ``transport()``; ``received`` is what it was sent."""

    received: list[bytes] = field(default_factory=list)
    queue: asyncio.Queue[bytes] = field(default_factory=asyncio.Queue)
    inbox: Any = None

    async def lines(self) -> AsyncIterator[bytes]:
        while line := await self.queue.get():
            yield line

    async def send(self, line: bytes) -> None:
        self.received.append(line)
        if self.inbox is not None:
            await self.inbox.send(SessionMessage(jsonrpc_message_adapter.validate_json(line)))

    @asynccontextmanager
    async def transport(self) -> AsyncIterator[Any]:
        self.inbox, incoming = anyio.create_memory_object_stream[Any](100)
        outgoing, outbox = anyio.create_memory_object_stream[SessionMessage](100)

        async def pump() -> None:
            async for item in outbox:
                text = item.message.model_dump_json(by_alias=True, exclude_unset=True)
                await self.queue.put(text.encode() + b"\n")

        task = asyncio.ensure_future(pump())
        try:
            async with self.inbox, incoming, outgoing, outbox:
                yield incoming, outgoing
        finally:
            task.cancel()
            await self.queue.put(b"")


@dataclass
class Tap:
    """A server, and every line that it sent."""

    inner: Upstream
    sent: list[bytes | None] = field(default_factory=list)

    async def __aenter__(self) -> Self:
        await self.inner.__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.inner.__aexit__(*error)

    async def send(self, line: bytes, message: Any) -> None:
        await self.inner.send(line, message)

    async def lines(self) -> AsyncIterator[bytes | None]:
        async for line in self.inner.lines():
            self.sent.append(line)
            yield line


class Script:
    """A server that answers each request with the next of the given lines, with the request's id for ``"$id"``.

    Without a line left it answers nothing; after ``end()`` it is gone.
    """

    def __init__(self, *lines: bytes | None) -> None:
        self.script = list(lines)
        self.got: list[Any] = []
        self._queue: asyncio.Queue[bytes | Exception | None] = asyncio.Queue()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None: ...

    async def send(self, line: bytes, message: Any) -> None:
        self.got.append(message)
        if self.script and isinstance(message, dict) and "method" in message:
            answer = self.script.pop(0)
            await self._queue.put(answer and answer.replace(b'"$id"', str(message["id"]).encode()))

    def end(self) -> None:
        self._queue.put_nowait(EOFError())

    async def lines(self) -> AsyncIterator[bytes | None]:
        while not isinstance(line := await self._queue.get(), Exception):
            yield line


@asynccontextmanager
async def proxied(
    server: Upstream, engine: Engine, *, mode: Any = "legacy", **options: Any
) -> AsyncIterator[tuple[Client, Wire, Tap]]:
    """An official client in front of a proxy in front of ``server``."""
    wire, tap = Wire(), Tap(server)
    ready = asyncio.get_running_loop().create_future()
    ready.set_result(None)
    async with tap:
        running = asyncio.ensure_future(Proxy(wire, tap, engine, ready, **options).run())
        try:
            async with Client(wire.transport(), mode=mode) as client:
                yield client, wire, tap
            await asyncio.wait_for(running, 10)
        finally:
            running.cancel()


@asynccontextmanager
async def scripted(engine: Engine, *lines: bytes | None, **options: Any) -> AsyncIterator[tuple[Wire, Script]]:
    """A proxy in front of a `Script`, without a client: put requests into ``wire.queue``."""
    wire, server = Wire(), Script(*lines)
    ready = asyncio.get_running_loop().create_future()
    ready.set_result(None)
    running = asyncio.ensure_future(Proxy(wire, server, engine, ready, **options).run())
    try:
        yield wire, server
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


def command() -> CommandServer:
    return CommandServer(SERVER, MAX_BYTES)


def request(id_: int = 1, method: str = "tools/call") -> bytes:
    return json.dumps({"jsonrpc": "2.0", "id": id_, "method": method, "params": {"name": "shot"}}).encode() + b"\n"


def result(**content: Any) -> bytes:
    return json.dumps({"jsonrpc": "2.0", "id": "$id", "result": content}).encode() + b"\n"


async def answered(wire: Wire, count: int = 1) -> list[Any]:
    """What the client was sent, once it is ``count`` messages."""
    async with asyncio.timeout(10):
        while len(wire.received) < count:
            await asyncio.sleep(0.005)
    return [json.loads(line) for line in wire.received]
