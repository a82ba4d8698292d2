"""``codefend mcp-proxy``: a proxy between an MCP client and a server that purifies every image the server sends.

`messages` finds and replaces the images of a JSON-RPC message, `upstream` speaks with servers (a command's standard
streams, or a streamable HTTP address), and `proxy` passes messages on and answers what it refuses. The client is at the
standard streams of this process.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor

from codefend.gateway.app import build_engine, build_lane
from codefend.gateway.config import Settings
from codefend.gateway.engine import Engine
from codefend.gateway.upstream import connect
from codefend.integrations.mcp.messages import Documents
from codefend.integrations.mcp.proxy import Proxy
from codefend.integrations.mcp.upstream import CommandServer, HttpServer, Upstream

_STDIN, _STDOUT, _STDERR = 0, 1, 2


def serve(settings: Settings, target: str | list[str], documents: Documents = "refuse") -> int:
    """Stand between standard input and output and an MCP server, a URL or a command, until one of them ends.

    Returns 0 when the client has closed its end and 1 when the server has ended. Raises CodefendError for a purifier
    or a command that cannot be started.
    """
    engine = build_engine(settings)
    engine.lane = build_lane(settings, engine.worker)
    server: Upstream
    if isinstance(target, str):
        key = settings.upstream_api_key
        transport = connect(settings.upstream_ca, settings.upstream_proxy)
        server = HttpServer(target, settings.max_body_bytes, transport, key.get_secret_value() if key else "")
    else:
        server = CommandServer(target, settings.max_body_bytes)
    return asyncio.run(_serve(engine, server, settings.max_body_bytes, documents))


async def _serve(engine: Engine, upstream: Upstream, max_bytes: int, documents: Documents) -> int:
    """Answer at once, while the workers start: only images wait for them."""
    ready = _in_background(engine.worker.warm_up)
    ready.add_done_callback(lambda done: done.cancelled() or done.exception())
    try:
        async with upstream as server:
            return await Proxy(StandardStreams(max_bytes), server, engine, ready, documents).run()
    finally:
        engine.worker.close()
        engine.close()
        ready.cancel()


def _in_background(work: Callable[[], None]) -> asyncio.Future[None]:
    """Run ``work`` in a thread that nothing waits for when the process ends, unlike those of an executor."""
    future = Future[None]()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            work()
            future.set_result(None)
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, name="warm-up", daemon=True).start()
    return asyncio.wrap_future(future)


class StandardStreams:
    """Reads standard input, and writes to standard output alone: whatever else writes there goes to standard error."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._input = os.fdopen(os.dup(_STDIN), "rb")
        self._output = os.fdopen(os.dup(_STDOUT), "wb")
        os.dup2(_STDERR, _STDOUT)
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="client")

    async def lines(self) -> AsyncIterator[bytes]:
        """Until the input ends, or holds a line over the limit."""
        queue: asyncio.Queue[bytes] = asyncio.Queue(1)
        loop = asyncio.get_running_loop()

        def read() -> None:  # a thread that may wait for ever, unlike those of an executor
            with contextlib.suppress(RuntimeError):  # the event loop has ended
                while True:
                    line = self._input.readline(self.max_bytes + 1)
                    asyncio.run_coroutine_threadsafe(queue.put(line), loop).result()
                    if not line:
                        return

        threading.Thread(target=read, name="stdin", daemon=True).start()
        while (line := await queue.get()) and len(line) <= self.max_bytes:
            yield line

    async def send(self, line: bytes) -> None:
        with contextlib.suppress(OSError):  # the client has gone: its input ends as well
            await asyncio.get_running_loop().run_in_executor(self._writer, self._write, line)

    def _write(self, line: bytes) -> None:
        self._output.write(line)
        self._output.flush()
