"""A toy upstream, the gateway and an open-loop load, in processes of their own, on 127.0.0.1 only."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import multiprocessing as mp
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

CHAT = "/v1/chat/completions"
KEEP: dict[str, Any] = {"timeout_keep_alive": 75}  # as `codefend serve`: the load may pause longer than uvicorn's 5 s
UPSTREAM_PORT = 9917  # fixed, so that a peer can be started in front of it beforehand
TEXT = "Tell me about the weather in the mountains. " * 40


# --- processes -------------------------------------------------------------------------------------------------------


async def upstream_app(scope: Any, receive: Any, send: Any) -> None:
    """Answers at once; streams ten events when asked to."""
    if scope["type"] != "http":
        return
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    if b'"stream":true' in body:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        for i in range(10):
            await send({"type": "http.response.body", "body": b"data: {}\n\n", "more_body": i < 9})
            await asyncio.sleep(0.005)
        return
    message = {"role": "assistant", "content": "Cold."}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    answer = json.dumps({"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]})
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(answer)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": answer.encode()})


def watched(inner: Any) -> Any:
    """The application with a watch on its event loop: ``/lag`` gives the longest stall since it was last asked.

    ``cpu_ms`` is the most that the loop's own thread worked in one go: a stall beyond it was spent waiting for a core.
    """
    lags: list[float] = []
    worked: list[float] = []
    keep: list[asyncio.Task[None]] = []

    async def watch() -> None:
        while True:
            start, busy = time.perf_counter(), time.thread_time()
            await asyncio.sleep(0.005)
            worked.append(time.thread_time() - busy)
            lags.append(time.perf_counter() - start - 0.005)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if not keep:
            keep.append(asyncio.create_task(watch()))
        if scope["type"] == "http" and scope["path"] == "/lag":
            found = {"max_ms": max(lags, default=0), "cpu_ms": max(worked, default=0)}
            body = json.dumps({name: round(seconds * 1000, 1) for name, seconds in found.items()}).encode()
            lags.clear()
            worked.clear()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": body})
            return
        await inner(scope, receive, send)

    return app


def run_upstream(port: int) -> None:
    import uvicorn

    uvicorn.run(watched(upstream_app), port=port, log_level="error", access_log=False, lifespan="off", **KEEP)


def run_gateway(port: int, flags: dict[str, Any]) -> None:
    import uvicorn

    from codefend.gateway.app import create_app
    from codefend.gateway.config import load_settings
    from codefend.gateway.serve import HTTP, keep_loop_free

    app = watched(create_app(load_settings(**flags)))
    keep_loop_free()
    quiet: dict[str, Any] = {"log_level": "error", "access_log": False, "server_header": False, "date_header": False}
    uvicorn.run(app, port=port, **quiet, **HTTP)


def await_port(port: int, alive: Callable[[], bool], name: str, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        if time.monotonic() > end or not alive():
            raise SystemExit(f"{name} did not start on port {port}")
        time.sleep(0.1)


@contextlib.contextmanager
def started(target: Any, *arguments: Any, port: int) -> Iterator[Any]:
    process = mp.get_context("spawn").Process(target=target, args=arguments)  # no daemon: the gateway has children
    process.start()
    await_port(port, process.is_alive, target.__name__, 300)
    try:
        yield process
    finally:
        process.terminate()
        process.join(10)
        process.kill()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def memory_mb(pid: int) -> dict[str, float]:
    """Memory of the gateway and of its worker processes. Pages that several share count once (Linux's PSS)."""
    import psutil

    process = psutil.Process(pid)
    found = {"gateway": _own_mb(process), "workers": 0.0}
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            found["workers"] += _own_mb(child)
    return {name: round(size, 1) for name, size in found.items()}


def _own_mb(process: Any) -> float:
    info = process.memory_full_info()
    return float(getattr(info, "pss", info.rss)) / 2**20


def cpu_seconds(pid: int) -> dict[str, float]:
    """CPU time of the gateway and of its worker processes so far: says more than clocks on a machine that is shared."""
    import psutil

    process = psutil.Process(pid)
    family = {"gateway": [process], "workers": process.children(recursive=True)}
    return {name: sum(sum(p.cpu_times()[:2]) for p in members) for name, members in family.items()}


# --- load ------------------------------------------------------------------------------------------------------------


@dataclass
class Target:
    """One address, its idle connections, and what was measured there."""

    name: str
    port: int
    pid: int = 0  # of the process and its children, for its CPU time
    host: str = "127.0.0.1"
    idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    failed: int = 0

    async def post(self, body: bytes, due: float) -> None:
        try:
            reader, writer = self.idle.pop() if self.idle else await asyncio.open_connection(self.host, self.port)
            head = f"POST {CHAT} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
            writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
            status, first = await read_answer(reader)
        except (OSError, asyncio.IncompleteReadError, ValueError):
            self.failed += 1
            return
        if status != 200:
            self.failed += 1
        self.seconds.append(time.perf_counter() - due)
        self.first.append(first - due)
        self.idle.append((reader, writer))

    def summary(self) -> dict[str, Any]:
        return {"requests": len(self.seconds), "failed": self.failed, "ms": spread(self.seconds)} | (
            {"first_byte_ms": spread(self.first)} if self.first != self.seconds else {}
        )


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, float]:
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    status = int(head.split()[1])
    if b"transfer-encoding: chunked" not in head:
        length = int(head.partition(b"content-length: ")[2].split(b"\r\n")[0])
        await reader.readexactly(length)
        return status, time.perf_counter()
    first = 0.0
    while True:
        size = int((await reader.readuntil(b"\r\n")).strip(), 16)
        await reader.readexactly(size + 2)
        first = first or time.perf_counter()
        if size == 0:
            return status, first


async def load(targets: list[Target], body: bytes, rate: float, seconds: float) -> None:
    """``rate`` requests a second to each target, in turn, whether or not earlier ones are done."""
    for target in targets:
        target.idle.clear()  # servers close what has been idle for some seconds
    tasks: set[asyncio.Task[None]] = set()
    start = time.perf_counter()
    for i in range(int(rate * seconds)):
        for j, target in enumerate(targets):
            due = start + (i + j / len(targets)) / rate
            if (pause := due - time.perf_counter()) > 0:
                await asyncio.sleep(pause)
            task = asyncio.create_task(target.post(body, due))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)


def spread(values: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values, n=100) if len(values) > 1 else values * 99
    return {f"p{q}": round(cuts[q - 1] * 1000, 3) for q in (50, 95, 99)}


async def get_json(port: int, path: str) -> Any:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {path} HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n".encode())
    raw = await reader.read()
    writer.close()
    return json.loads(raw[raw.index(b"{") : raw.rindex(b"}") + 1])


def image_body(seed: int, side: int) -> bytes:
    import numpy as np
    import torch

    from codefend.core import images

    generator = np.random.default_rng(seed + 1)
    coarse = torch.from_numpy(generator.random((1, 3, 8, 8), dtype=np.float32))
    pixels = torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear")[0]
    url = "data:image/jpeg;base64," + base64.b64encode(images.encode(pixels, "JPEG", quality=90)).decode()
    content = [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": url}}]
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": content}]}).encode()
