"""What the gateway costs: pass-through, first streamed token, images, event loop, memory.

    python benchmarks/gateway.py passthrough --rate 200 --seconds 20 --litellm ~/litellm-venv/bin/litellm
    python benchmarks/gateway.py stream --rate 50
    python benchmarks/gateway.py images --purifier jpeg --side 1500
    python benchmarks/gateway.py memory --requests 10000 --side 224

A toy upstream, the gateway and the load are processes of their own. Direct and proxied requests alternate in one
open-loop schedule, so that both meet the same machine at the same moment; latency counts from when a request was due.
LiteLLM's proxy, where it is installed, takes turns with the gateway in the same run. ``cpu_ms`` is the CPU time of a
request in all processes of the gateway or the peer, which a busy machine changes less than latency. One JSON object
goes to standard output. ``upstream_loop`` is the longest stall of a process with next to nothing to do: what the
machine itself adds.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from gateway_common import (
    TEXT,
    UPSTREAM_PORT,
    Target,
    await_port,
    cpu_seconds,
    free_port,
    get_json,
    image_body,
    load,
    memory_mb,
    run_gateway,
    run_upstream,
    spread,
    started,
)


@contextlib.contextmanager
def litellm(command: str | None) -> Iterator[Target | None]:
    """LiteLLM's proxy before the same upstream, or None and a line that says so."""
    found = shutil.which(command or "litellm")
    if found is None:
        print(
            "no peer: LiteLLM is not installed (own venv, pip install 'litellm[proxy]', --litellm PATH)",
            file=sys.stderr,
        )
        yield None
        return
    port = free_port()
    model = {"model": "openai/m", "api_base": f"http://127.0.0.1:{UPSTREAM_PORT}/v1", "api_key": "none"}
    environment = os.environ | {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR"}
    environment["LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY"] = "true"  # on 127.0.0.1, for a minute
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.yaml"  # JSON is YAML
        config.write_text(json.dumps({"model_list": [{"model_name": "m", "litellm_params": model}]}))
        arguments = [found, "--config", str(config), "--host", "127.0.0.1", "--port", str(port), "--telemetry", "False"]
        process = subprocess.Popen(arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            await_port(port, lambda: process.poll() is None, "litellm", 600)
            yield Target("litellm", port, process.pid)
        finally:
            process.terminate()
            process.wait(20)


def passthrough(options: argparse.Namespace, *, stream: bool = False) -> dict[str, Any]:
    message = {"model": "m", "messages": [{"role": "user", "content": TEXT}], "stream": stream}
    body = json.dumps(message, separators=(",", ":")).encode()
    port = free_port()
    flags = {"upstream": f"http://127.0.0.1:{UPSTREAM_PORT}", "purifier": options.purifier, "log_level": "error"}
    with (
        started(run_upstream, UPSTREAM_PORT, port=UPSTREAM_PORT),
        started(run_gateway, port, flags, port=port) as gate,
        litellm(options.litellm) as peer,
    ):
        pairs = [(Target("direct", UPSTREAM_PORT), Target("gateway", port, gate.pid))]
        if peer is not None:
            pairs.append((Target("direct", UPSTREAM_PORT), peer))

        async def measure() -> Any:
            for pair in pairs:
                await load(list(pair), body, options.rate / 2, 2)  # warm connections and caches
                for target in pair:
                    target.seconds, target.first, target.failed = [], [], 0
            for at in (port, UPSTREAM_PORT):
                await get_json(at, "/lag")
            spent = {through.name: -sum(cpu_seconds(through.pid).values()) for _, through in pairs}
            for _ in range(4):  # in turns: a peer that cannot keep up must not disturb the other
                for pair in pairs:
                    await load(list(pair), body, options.rate, options.seconds / 4)
            for _, through in pairs:
                spent[through.name] += sum(cpu_seconds(through.pid).values())
            return await get_json(port, "/lag"), await get_json(UPSTREAM_PORT, "/lag"), spent

        lag, idle, spent = asyncio.run(measure())
    found = {through.name: compared(direct, through, stream) for direct, through in pairs}
    for _, through in pairs:
        found[through.name]["cpu_ms"] = round(spent[through.name] / max(1, len(through.seconds)) * 1000, 2)
    machine = {"load_average": os.getloadavg(), "rate": options.rate}
    return found | {"gateway_loop": lag, "upstream_loop": idle} | machine


def compared(direct: Target, through: Target, stream: bool) -> dict[str, Any]:
    found = through.summary() | {"direct": direct.summary()}
    for name, values in (("overhead_ms", "seconds"), ("first_byte_overhead_ms", "first"))[: 1 + stream]:
        ours, bare = spread(getattr(through, values)), spread(getattr(direct, values))
        found[name] = {key: round(ours[key] - bare[key], 3) for key in ours}
    return found


def with_images(options: argparse.Namespace) -> dict[str, Any]:
    """Closed loop, against three things on the same files: the purifier itself (pixels in, pixels out), one worker
    that also decodes and encodes (what `codefend purify` does), and all workers without the HTTP around them."""
    bodies = [image_body(seed, options.side) for seed in range(options.requests)]
    datas = [base64.b64decode(json.loads(b)["messages"][0]["content"][1]["image_url"]["url"][23:]) for b in bodies]
    purified, alone = one_worker(options.purifier, datas)
    pooled = all_workers(options, datas)
    port = free_port()
    flags: dict[str, Any] = {"upstream": f"http://127.0.0.1:{UPSTREAM_PORT}", "purifier": options.purifier}
    flags |= {"log_level": "error", "workers": options.workers, "isolate": not options.threads}
    with started(run_upstream, UPSTREAM_PORT, port=UPSTREAM_PORT), started(run_gateway, port, flags, port=port) as gate:
        pid = gate.pid

        async def measure() -> Any:
            target, slots = Target("gateway", port), asyncio.Semaphore(options.parallel)

            async def one(body: bytes) -> None:
                async with slots:
                    await target.post(body, time.perf_counter())

            await Target("warm", port).post(image_body(-1, 64), 0.0)  # what is imported at the first request
            for at in (port, UPSTREAM_PORT):
                await get_json(at, "/lag")
            spent = cpu_seconds(pid)
            begin = time.perf_counter()
            await asyncio.gather(*(one(body) for body in bodies))
            through = time.perf_counter() - begin
            spent = {name: seconds - spent[name] for name, seconds in cpu_seconds(pid).items()}
            lags = await get_json(port, "/lag"), await get_json(UPSTREAM_PORT, "/lag")
            cached = Target("cached", port)
            for body in bodies[-20:]:
                await cached.post(body, time.perf_counter())
            return target, cached, through, lags, spent

        target, cached, through, lags, spent = asyncio.run(measure())
        resident = memory_mb(pid)
    count = len(bodies)
    rates = {"purifier_alone": purified, "one_worker": alone, "all_workers": pooled, "gateway": through}
    return {
        "per_s": {name: round(count / seconds, 2) for name, seconds in rates.items()},
        "share_of_purifier": round(purified / through, 3),
        "share_of_one_worker": round(alone / through, 3),
        "share_of_all_workers": round(pooled / through, 3),
        "cpu_ms_per_image": {name: round(seconds / count * 1000, 1) for name, seconds in spent.items()},
        "gateway": target.summary(),
        "cache_hit": cached.summary(),
        "gateway_loop": lags[0],
        "upstream_loop": lags[1],
        "memory_mb": resident,
        "side": options.side,
    }


def one_worker(name: str, datas: list[bytes]) -> tuple[float, float]:
    """Seconds in the purifier alone, and in a whole worker in this process, for the same files."""
    from codefend import purifiers
    from codefend.gateway.worker import Job, Worker

    worker = Worker(purifiers.load(name))
    worker.run([Job(datas[0])])
    start = time.perf_counter()
    results: list[Any] = [worker.run([Job(data)])[0] for data in datas]
    return sum(result.seconds for result in results), time.perf_counter() - start


def all_workers(options: argparse.Namespace, datas: list[bytes]) -> float:
    """Seconds that as many worker processes as the gateway's need for the files."""
    from codefend.gateway.app import build_worker
    from codefend.gateway.options import PoolOptions
    from codefend.gateway.pool import Pool
    from codefend.gateway.worker import Job, WorkerOptions

    build = partial(build_worker, options.purifier, WorkerOptions())
    pool = Pool(build, PoolOptions(options.workers, timeout_s=300), name=options.purifier)
    pool.warm_up()
    start = time.perf_counter()
    with ThreadPoolExecutor(options.workers) as threads:
        list(threads.map(lambda data: pool.run([Job(data)]), datas))
    seconds = time.perf_counter() - start
    pool.close()
    return seconds


def memory(options: argparse.Namespace) -> dict[str, Any]:
    """Different images all the time: resident memory must come to rest once the cache is full."""
    port = free_port()
    upstream = f"http://127.0.0.1:{UPSTREAM_PORT}"
    flags = {"upstream": upstream, "purifier": options.purifier, "log_level": "error", "cache_mb": 16}
    points: list[list[Any]] = []
    with started(run_upstream, UPSTREAM_PORT, port=UPSTREAM_PORT), started(run_gateway, port, flags, port=port) as gate:

        async def measure() -> Target:
            target = Target("gateway", port)
            for start in range(0, options.requests, options.parallel):
                numbers = range(start, min(start + options.parallel, options.requests))
                bodies = [image_body(number, options.side) for number in numbers]
                await asyncio.gather(*(target.post(body, time.perf_counter()) for body in bodies))
                if start // options.parallel % max(1, options.requests // options.parallel // 20) == 0:
                    points.append([start, memory_mb(gate.pid)])
            points.append([options.requests, memory_mb(gate.pid)])
            return target

        target = asyncio.run(measure())
    middle, last = points[len(points) // 2][1], points[-1][1]
    growth = {name: round(last[name] - middle[name], 1) for name in last}
    return {"memory_mb": points, "growth_mb_in_second_half": growth, "failed": target.failed, "side": options.side}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["passthrough", "stream", "images", "memory"])
    parser.add_argument("--rate", type=float, default=200.0, help="requests per second to each target")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--parallel", type=int, default=16)
    parser.add_argument("--side", type=int, default=512, help="pixels")
    parser.add_argument("--purifier", default="jpeg")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", action="store_true", help="workers are threads, not processes")
    parser.add_argument("--litellm", help="LiteLLM's command, when it is not on the PATH")
    options = parser.parse_args()
    measures = {"images": with_images, "memory": memory, "passthrough": passthrough}
    stream = options.what == "stream"
    found = passthrough(options, stream=True) if stream else measures[options.what](options)
    print(json.dumps({"what": options.what, "cpus": os.cpu_count()} | found, indent=2))


if __name__ == "__main__":
    main()
