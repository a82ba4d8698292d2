"""The gateway under everything at once: killed upstreams and workers, slow readers, clients that leave, hostile images.

    python benchmarks/gateway_soak.py --minutes 10

Runs `codefend serve` on 127.0.0.1 before an upstream that dies now and then, and checks: the gateway lives, what it
holds (memory, files, requests in flight) comes back down, no original image ever reaches the upstream, and every
refusal is a JSON error in the API's own form. Prints one JSON object; exit status 1 when something is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import json
import multiprocessing as mp
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from gateway_common import await_port, free_port, memory_mb
from gateway_hostile import PATHS, Request, good, hostile, survived

BUSY = frozenset({429, 502, 503, 504})  # of a gateway whose upstream or workers are killed on purpose
FLAGS = {  # all else as by default
    "upstream-timeout-s": 3,  # some of the upstream's answers never come
    "cache-mb": 16,  # so that growth is not the cache's
    "log-level": "error",
}


# --- the upstream ----------------------------------------------------------------------------------------------------


def run_upstream(port: int, folder: str) -> None:
    import uvicorn

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raw, more = b"", True
        while more:
            message = await receive()
            raw += message.get("body", b"")
            more = message.get("more_body", False)
        with open(Path(folder) / "seen", "a") as seen:
            for data in images_in(json.loads(raw)):
                seen.write("!" if survived(data) else ".")
        await answer(json.loads(raw), send)

    uvicorn.run(app, port=port, log_level="critical", access_log=False, lifespan="off")


def images_in(value: Any) -> list[bytes]:
    if isinstance(value, dict):
        return [data for inner in value.values() for data in images_in(inner)]
    if isinstance(value, list):
        return [data for inner in value for data in images_in(inner)]
    if isinstance(value, str) and len(value) > 100 and " " not in value:
        return [base64.b64decode(value.rpartition(",")[2])]
    return []


async def answer(body: dict[str, Any], send: Any) -> None:
    """As the model's name says: at once, as a long stream, with an error, never, or breaking off."""
    model = body["model"]
    if model == "hang":
        await asyncio.sleep(60)
    status, stream = (500 if model == "error" else 200), bool(body.get("stream"))
    kind = b"text/event-stream" if stream else b"application/json"
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", kind)]})
    if stream:
        for _ in range(100):
            await send({"type": "http.response.body", "body": b"data: " + b"x" * 20_000 + b"\n\n", "more_body": True})
            await asyncio.sleep(0.005)
    if model == "break":
        raise ConnectionError
    await send({"type": "http.response.body", "body": b'{"ok": true}'})


# --- the clients -----------------------------------------------------------------------------------------------------


@dataclass
class Soak:
    port: int
    until: float
    seed: int
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    async def client(self, number: int) -> None:
        rng = random.Random(f"{self.seed}.{number}")
        keep: list[bytes] = []
        kinds = {self.plain: 6, self.attacker: 5, self.streaming: 2, self.leaver: 3, self.slow_reader: 1}
        while time.monotonic() < self.until:
            kind = rng.choices(list(kinds), list(kinds.values()))[0]
            self.counts[kind.__name__] += 1
            try:
                await asyncio.wait_for(kind(rng, keep), 60)
            except TimeoutError:
                self.wrong.append(f"{kind.__name__}: no answer within 60 s")
            except (OSError, asyncio.IncompleteReadError):  # a body over the limit: the answer may be lost with it
                self.counts["reset"] += 1

    async def plain(self, rng: random.Random, keep: list[bytes]) -> None:
        model = rng.choices(("ok", "error", "hang", "break"), (10, 1, 1, 1))[0]
        request = good(rng, keep, model)
        expected = {"ok": {200}, "error": {500}, "hang": {504}, "break": {200}}[model]
        await self.exchange(request, expected | BUSY, cut=model == "break")

    async def attacker(self, rng: random.Random, keep: list[bytes]) -> None:
        request = hostile(rng)
        await self.exchange(request, request[2] | BUSY)

    async def streaming(self, rng: random.Random, keep: list[bytes]) -> None:
        await self.exchange(good(rng, keep, "ok", stream=True), {200} | BUSY, cut=True)

    async def slow_reader(self, rng: random.Random, keep: list[bytes]) -> None:
        reader, writer = await self.sent(good(rng, keep, "ok", stream=True))
        with contextlib.closing(writer):
            for _ in range(rng.randrange(20, 100)):
                if not await reader.read(4096):
                    break
                await asyncio.sleep(0.05)

    async def leaver(self, rng: random.Random, keep: list[bytes]) -> None:
        """Leaves while sending, while waiting, or in the middle of a stream."""
        request = good(rng, keep, rng.choice(("ok", "hang")), stream=rng.random() < 0.5)
        part = rng.choice((0.0, 0.5, 1.0))
        reader, writer = await self.sent(request, part=part)
        with contextlib.closing(writer):
            await asyncio.sleep(rng.random() * 0.3)
            if part == 1 and rng.random() < 0.5:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(reader.read(1000), 2)
            writer.transport.abort()

    async def sent(self, request: Request, *, part: float = 1.0) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        api, body, _ = request
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        head = f"POST {PATHS[api]} HTTP/1.1\r\nhost: 127.0.0.1\r\n"
        head += "connection: close\r\ncontent-type: application/json\r\n"
        writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body[: int(len(body) * part)])
        if part == 1:
            await writer.drain()
        return reader, writer

    async def exchange(self, request: Request, expected: frozenset[int] | set[int], *, cut: bool = False) -> None:
        """Send and read to the end; ``cut``: the answer may break off, as the upstream does."""
        reader, writer = await self.sent(request)
        with contextlib.closing(writer):
            raw = await reader.read(-1)
        head, _, body = raw.partition(b"\r\n\r\n")
        status = int(head.split()[1]) if head else 0
        self.counts[str(status)] += 1
        if status == 0 and cut:
            return
        if status == 500 and b"a worker process ended" in body and self.counts["workers killed"]:
            self.counts["lost with a worker"] += 1  # killed twice in a row, while it was being replaced
        elif status not in expected:
            self.wrong.append(f"{request[0]}: status {status}, expected {sorted(expected)}: {body[:200]!r}")
        elif b"x-codefend-status: refused" in head.lower() and not well_formed(request[0], body):
            self.wrong.append(f"{request[0]}: refusal in another form: {body[:200]!r}")
        elif status in (400, 413, 429, 502, 503, 504) and b"x-codefend-status: refused" not in head.lower():
            self.wrong.append(f"{request[0]}: {status} that is not the gateway's: {body[:200]!r}")


def well_formed(api: str, body: bytes) -> bool:
    try:
        answer = json.loads(body)
        error = answer["error"]
        own = answer["type"] == "error" if api == "messages" else isinstance(error["code"], str)
        return bool(own and error["type"] and 5 < len(error["message"]) < 300)
    except (ValueError, KeyError, TypeError):
        return False


# --- what is killed, what is watched ---------------------------------------------------------------------------------


async def killing(soak: Soak, port: int, folder: str, gateway: psutil.Process) -> None:
    """Every few seconds the upstream dies for a moment; sometimes a worker of the gateway dies or freezes."""
    rng, context = random.Random(soak.seed), mp.get_context("spawn")
    upstream = context.Process(target=run_upstream, args=(port, folder), daemon=True)
    upstream.start()
    try:
        while time.monotonic() < soak.until:
            await asyncio.sleep(rng.uniform(8, 20))
            if rng.random() < 0.4 and (workers := leaves(gateway)):
                worker, freeze = rng.choice(workers), rng.random() < 0.5
                with contextlib.suppress(psutil.Error):
                    worker.suspend() if freeze else worker.kill()
                soak.counts["workers frozen" if freeze else "workers killed"] += 1
                continue
            upstream.kill()
            upstream.join()
            soak.counts["upstreams killed"] += 1
            await asyncio.sleep(rng.uniform(0, 2))
            upstream = context.Process(target=run_upstream, args=(port, folder), daemon=True)
            upstream.start()
    finally:
        upstream.kill()


def leaves(gateway: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        return [child for child in gateway.children(recursive=True) if child.ppid() != gateway.pid]
    return []


async def watching(soak: Soak, gateway: psutil.Process, points: list[dict[str, float]]) -> None:
    while time.monotonic() < soak.until:
        await asyncio.sleep(max(1.0, min(15.0, (soak.until - time.monotonic()) / 4)))
        with contextlib.suppress(psutil.Error):
            points.append({"s": round(time.monotonic()), **memory_mb(gateway.pid), "files": gateway.num_fds()})


async def metrics(port: int) -> dict[str, float]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    with contextlib.closing(writer):
        writer.write(b"GET /metrics HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n")
        lines = (await reader.read(-1)).decode().splitlines()
    pairs = [line.rsplit(" ", 1) for line in lines if line.startswith("codefend_")]
    return {name: float(value) for name, value in pairs}


async def soaked(options: argparse.Namespace, port: int, folder: str, process: Any) -> dict[str, Any]:
    soak = Soak(port, time.monotonic() + options.minutes * 60, options.seed)
    gateway, points = psutil.Process(process.pid), []  # type: ignore[var-annotated]
    files = gateway.num_fds()
    await asyncio.gather(
        killing(soak, options.upstream_port, folder, gateway),
        watching(soak, gateway, points),
        *(soak.client(number) for number in range(options.clients)),
    )
    if process.poll() is not None:
        return {"wrong": [f"the gateway ended with {process.poll()}", *soak.wrong[:20]], "counts": soak.counts}
    await asyncio.sleep(5)
    end = await metrics(port)
    seen = (Path(folder) / "seen").read_text() if (Path(folder) / "seen").exists() else ""
    soak.wrong += [] if seen else ["no image reached the upstream: nothing was tested"]
    soak.wrong += [f"{seen.count('!')} originals reached the upstream"] if "!" in seen else []
    soak.wrong += [f"{name} is {end[name]}" for name in ("codefend_in_flight", "codefend_queue_images") if end[name]]
    soak.wrong += [f"{gateway.num_fds()} open files, {files} before"] if gateway.num_fds() > files + 40 else []
    half = points[len(points) // 2 :]
    growth = half[-1]["gateway"] - half[0]["gateway"] if half else 0.0
    soak.wrong += [f"grew by {growth} MB in the second half"] if growth > 50 else []
    refused = {name: value for name, value in end.items() if "refused_total{" in name}
    return {
        "wrong": soak.wrong[:50],
        "counts": soak.counts,
        "images at the upstream": len(seen),
        "points": points,
        "growth_mb_in_second_half": round(growth, 1),
        "open_files": [files, gateway.num_fds()],
        "refused": refused,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    port, options.upstream_port = free_port(), free_port()
    command = [
        sys.executable,
        "-c",
        "import sys; from codefend.cli import main; sys.exit(main())",
        "serve",
        "--port",
        str(port),
    ]
    command += ["--upstream", f"http://127.0.0.1:{options.upstream_port}"]
    for name, value in FLAGS.items():
        command += [f"--{name}", str(value)]
    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "log", "w+") as log:
        process = subprocess.Popen(command, stderr=log)
        try:
            await_port(port, lambda: process.poll() is None, "codefend serve", 120)
            found = asyncio.run(soaked(options, port, folder, process))
            process.send_signal(signal.SIGTERM)
            found["exit"] = process.wait(60)
        except SystemExit:
            print(Path(log.name).read_text()[-2000:], file=sys.stderr)
            raise
        finally:
            process.kill()
        log.seek(0)
        lines = log.read().splitlines()
    if found.get("exit"):
        found["wrong"].append(f"exit status {found['exit']}")
    found["wrong"] += [line[:300] + line[-1500:] for line in lines if "internal error" in line or "Traceback" in line][
        :5
    ]
    print(json.dumps({"what": "soak", "minutes": options.minutes} | found, indent=2))
    return 1 if found["wrong"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
