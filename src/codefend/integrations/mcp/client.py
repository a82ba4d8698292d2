"""The client's side of the proxy: the standard streams of this process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor

_STDIN, _STDOUT, _STDERR = 0, 1, 2


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
