"""What the gateway costs: pass-through, first streamed token, images, event loop, memory.

    python benchmarks/gateway.py passthrough --rate 200 --seconds 20
    python benchmarks/gateway.py passthrough --peer http://127.0.0.1:4000     # a proxy in front of port 9917
    python benchmarks/gateway.py stream
    python benchmarks/gateway.py images --purifier jpeg
    python benchmarks/gateway.py memory --requests 10000

A toy upstream, the gateway and the load are three processes. Direct and proxied requests alternate in one open-loop
schedule, so that both meet the same machine at the same moment; latency counts from when a request was due. One JSON
object goes to standard output.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import json
import multiprocessing as mp
import os
import socket
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

CHAT = "/v1/chat/completions"
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


def run_upstream(port: int) -> None:
    import uvicorn

    uvicorn.run(upstream_app, port=port, log_level="error", access_log=False, lifespan="off")


def run_gateway(port: int, flags: dict[str, Any]) -> None:
    """The gateway, with a watch on its event loop at ``/lag``."""
    import uvicorn

    from codefend.gateway.app import create_app
    from codefend.gateway.config import load_settings

    sys.setswitchinterval(0.001)  # as codefend.gateway.serve does
    inner = create_app(load_settings(**flags))
    lags: list[float] = []
    keep: list[asyncio.Task[None]] = []

    async def watch() -> None:
        while True:
            start = time.perf_counter()
            await asyncio.sleep(0.005)
            lags.append(time.perf_counter() - start - 0.005)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if not keep:
            keep.append(asyncio.create_task(watch()))
        if scope["type"] == "http" and scope["path"] == "/lag":
            body = json.dumps({"max_ms": max(lags, default=0) * 1000, "rss_mb": rss_mb(os.getpid())}).encode()
            lags.clear()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": body})
            return
        await inner(scope, receive, send)

    uvicorn.run(app, port=port, log_level="error", access_log=False, server_header=False, date_header=False, ws="none")


@contextlib.contextmanager
def started(target: Any, *arguments: Any, port: int) -> Iterator[Any]:
    process = mp.get_context("spawn").Process(target=target, args=arguments, daemon=True)
    process.start()
    end = time.monotonic() + 60
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            break
        if time.monotonic() > end or not process.is_alive():
            raise SystemExit(f"{target.__name__} did not start on port {port}")
        time.sleep(0.1)
    try:
        yield process
    finally:
        process.terminate()
        process.join(10)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def rss_mb(pid: int) -> float:
    with open(f"/proc/{pid}/statm") as stream:
        return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


# --- load ------------------------------------------------------------------------------------------------------------


@dataclass
class Target:
    """One address, its idle connections, and what was measured there."""

    name: str
    port: int
    host: str = "127.0.0.1"
    idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    failed: int = 0

    async def post(self, body: bytes, due: float) -> None:
        try:
            reader, writer = self.idle.pop() if self.idle else await asyncio.open_connection(self.host, self.port)
            head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
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
    writer.write(f"GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
    raw = await reader.read()
    writer.close()
    return json.loads(raw[raw.index(b"{") : raw.rindex(b"}") + 1])


def image_body(seed: int, side: int) -> bytes:
    import numpy as np
    import torch

    from codefend import images

    generator = np.random.default_rng(seed)
    coarse = torch.from_numpy(generator.random((1, 3, 8, 8), dtype=np.float32))
    pixels = torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear")[0]
    url = "data:image/jpeg;base64," + base64.b64encode(images.encode(pixels, "JPEG", quality=90)).decode()
    content = [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": url}}]
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": content}]}).encode()


# --- the measurements ------------------------------------------------------------------------------------------------


def passthrough(options: argparse.Namespace, *, stream: bool = False) -> dict[str, Any]:
    message = {"model": "m", "messages": [{"role": "user", "content": TEXT}], "stream": stream}
    body = json.dumps(message, separators=(",", ":")).encode()
    port = free_port()
    flags = {"upstream": f"http://127.0.0.1:{UPSTREAM_PORT}", "purifier": options.purifier, "log_level": "error"}
    with started(run_upstream, UPSTREAM_PORT, port=UPSTREAM_PORT), started(run_gateway, port, flags, port=port):
        targets = [Target("direct", UPSTREAM_PORT), Target("gateway", port)]
        if options.peer:
            host, _, peer_port = options.peer.removeprefix("http://").rstrip("/").partition(":")
            targets.append(Target("peer", int(peer_port), host))

        async def measure() -> Any:
            await load(targets, body, options.rate / 2, 2)  # warm connections and caches
            for target in targets:
                target.seconds, target.first, target.failed = [], [], 0
            await get_json(port, "/lag")
            await load(targets, body, options.rate, options.seconds)
            return await get_json(port, "/lag")

        lag = asyncio.run(measure())
    found: dict[str, Any] = {target.name: target.summary() for target in targets}
    for target in targets[1:]:
        pairs = (("overhead_ms", "seconds"), ("first_byte_overhead_ms", "first"))
        for name, values in pairs if stream else pairs[:1]:
            ours, direct = spread(getattr(target, values)), spread(getattr(targets[0], values))
            found[target.name][name] = {key: round(ours[key] - direct[key], 3) for key in ours}
    return found | {"gateway_loop": lag, "rate": options.rate}


def with_images(options: argparse.Namespace) -> dict[str, Any]:
    """Closed loop: as many images at a time as the queue takes, against the worker called directly."""
    import torch

    from codefend import purifiers
    from codefend.gateway.worker import Job, Worker

    bodies = [image_body(seed, options.side) for seed in range(options.requests)]
    datas = [base64.b64decode(json.loads(b)["messages"][0]["content"][1]["image_url"]["url"][23:]) for b in bodies]
    worker = Worker(purifiers.load(options.purifier))
    worker.run([Job(datas[0])])
    start = time.perf_counter()
    purified = images_alone = 0.0
    for data in datas:
        begin = time.perf_counter()
        result: Any = worker.run([Job(data)])[0]
        purified += result.seconds
        images_alone += time.perf_counter() - begin
    alone = time.perf_counter() - start
    port = free_port()
    flags = {"upstream": f"http://127.0.0.1:{UPSTREAM_PORT}", "purifier": options.purifier, "log_level": "error"}
    with started(run_upstream, UPSTREAM_PORT, port=UPSTREAM_PORT), started(run_gateway, port, flags, port=port):

        async def measure() -> Any:
            target, gate = Target("gateway", port), asyncio.Semaphore(options.parallel)

            async def one(body: bytes) -> None:
                async with gate:
                    await target.post(body, time.perf_counter())

            await get_json(port, "/lag")
            begin = time.perf_counter()
            await asyncio.gather(*(one(body) for body in bodies))
            through = time.perf_counter() - begin
            lag = await get_json(port, "/lag")
            begin = time.perf_counter()
            cached = Target("cached", port)
            for body in bodies:
                await cached.post(body, time.perf_counter())
            return target, cached, through, lag

        target, cached, through, lag = asyncio.run(measure())
    count = len(bodies)
    return {
        "purifier_alone_per_s": round(count / purified, 2),
        "worker_alone_per_s": round(count / alone, 2),
        "gateway_per_s": round(count / through, 2),
        "share_of_purifier": round(purified / through, 3),
        "gateway": target.summary(),
        "cache_hit": cached.summary(),
        "gateway_loop": lag,
        "torch_threads": torch.get_num_threads(),
        "side": options.side,
    }


def memory(options: argparse.Namespace) -> dict[str, Any]:
    """Different images all the time: resident memory must come to rest once the cache is full."""
    port = free_port()
    upstream = f"http://127.0.0.1:{UPSTREAM_PORT}"
    flags = {"upstream": upstream, "purifier": options.purifier, "log_level": "error", "cache_mb": 16}
    points = []
    with started(run_upstream, UPSTREAM_PORT, port=UPSTREAM_PORT), started(run_gateway, port, flags, port=port) as gate:

        async def measure() -> None:
            target = Target("gateway", port)
            for i in range(options.requests):
                await target.post(image_body(i, options.side), time.perf_counter())
                if i % max(1, options.requests // 20) == 0:
                    points.append([i, round(rss_mb(gate.pid), 1)])
            points.append([options.requests, round(rss_mb(gate.pid), 1)])

        asyncio.run(measure())
    return {"rss_mb": points, "growth_mb_in_second_half": round(points[-1][1] - points[len(points) // 2][1], 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["passthrough", "stream", "images", "memory"])
    parser.add_argument("--rate", type=float, default=200.0, help="requests per second to each target")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--parallel", type=int, default=16)
    parser.add_argument("--side", type=int, default=512, help="pixels")
    parser.add_argument("--purifier", default="jpeg")
    parser.add_argument("--peer", help=f"http://host:port of a proxy in front of http://127.0.0.1:{UPSTREAM_PORT}")
    options = parser.parse_args()
    measures = {"images": with_images, "memory": memory, "passthrough": passthrough}
    stream = options.what == "stream"
    found = passthrough(options, stream=True) if stream else measures[options.what](options)
    print(json.dumps({"what": options.what, "cpus": os.cpu_count()} | found, indent=2))


if __name__ == "__main__":
    main()
