"""CPU time of two checkouts on the same work, in processes that alternate: purify, an evaluation, the gateway.

    python benchmarks/side_by_side.py OTHER/src [--work purify evaluate gateway] [--runs 5] [--warmup 1]

User and system seconds, and ratios of neighbouring runs: other load on the machine changes these less than wall time.
``purify`` and ``evaluate`` are whole processes, imports included; ``gateway`` is the server's CPU time, worker
processes included, over 40 requests with one image each, after one that is not counted.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

HERE = Path(__file__).parent.parent / "src"
CODEFEND = (sys.executable, "-m", "codefend.cli")
EVALUATION = ("tasks=vqa", "limit=2", "defenses=none,bridge", "adaptive=bridge", "steps=2", "eot=1", "attacks=apgd")
REQUESTS = 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path)
    parser.add_argument("--work", nargs="+", choices=WORK, default=list(WORK))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1, help="runs before these, which are not counted")
    arguments = parser.parse_args()
    for name in arguments.work:
        seconds: dict[Path, list[float]] = {HERE: [], arguments.other.resolve(): []}
        for run in range(-arguments.warmup, arguments.runs):
            for src in list(seconds)[:: 1 if run % 2 else -1]:
                with tempfile.TemporaryDirectory() as folder:
                    spent = WORK[name](src, Path(folder))
                if run >= 0:
                    seconds[src].append(spent)
        print_comparison(name, *seconds.values())


def print_comparison(name: str, here: list[float], other: list[float]) -> None:
    ratios = [a / b for a, b in zip(here, other, strict=True)]
    print(
        f"{name}: {statistics.median(here):.2f} s here, {statistics.median(other):.2f} s there; ratio of neighbours: "
        f"median {statistics.median(ratios):.3f}, from {min(ratios):.3f} to {max(ratios):.3f}, n = {len(ratios)}",
        flush=True,
    )


def environment(src: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(src), "OMP_NUM_THREADS": "1", "CODEFEND_PRECISION": "float32"}


def run(src: Path, folder: Path, *arguments: object) -> float:
    """CPU seconds of ``codefend ARGUMENTS``."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [*CODEFEND, *map(str, arguments)]
    subprocess.run(command, cwd=folder, env=environment(src), check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def save_image(path: Path, side: int) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)).save(path)


def purify(src: Path, folder: Path) -> float:
    save_image(folder / "image.png", 512)
    return run(src, folder, "purify", "image.png", "--out", "clean.png")


def evaluate(src: Path, folder: Path) -> float:
    settings = [word for setting in EVALUATION for word in ("--set", setting)]
    return run(src, folder, "eval", "quick", "--run", folder / "run", *settings)


# --- the gateway -----------------------------------------------------------------------------------------------------


class Upstream(BaseHTTPRequestHandler):
    """Answers every request with an empty completion."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        body = b'{"choices": []}'
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing: requests are not logged."""


def gateway(src: Path, folder: Path) -> float:
    upstream = ThreadingHTTPServer(("127.0.0.1", 0), Upstream)
    threading.Thread(target=upstream.serve_forever, daemon=True).start()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{upstream.server_port}/v1"
    # One thread: on a busy machine two of them spend most of their CPU time waiting for each other.
    flags = ("--purify-timeout-s", "300", "--torch-threads", "1")
    command = [*CODEFEND, "serve", "--upstream", address, "--port", str(port), *flags]
    with (folder / "log").open("wb") as log:
        server = psutil.Popen(command, cwd=folder, env=environment(src), stdout=log, stderr=log)
    try:
        bodies = [chat(folder, number) for number in range(REQUESTS + 1)]
        send(port, bodies[0], folder)
        before = settled_seconds(server)
        for body in bodies[1:]:
            send(port, body, folder)
        return tree_seconds(server) - before
    finally:
        server.terminate()
        server.wait(60)
        upstream.shutdown()


def chat(folder: Path, number: int) -> bytes:
    """A request with an image of 128 pixels, another for each number: the gateway has a cache."""
    path = folder / "image.png"
    pixels = np.random.default_rng(number).integers(0, 256, (128, 128, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    url = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
    parts = [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": url}}]
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": parts}]}).encode()


def send(port: int, body: bytes, folder: Path, patience: float = 600) -> None:
    """Post a request; the server is given time to start."""
    end = time.monotonic() + patience
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
        try:
            connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
            status = connection.getresponse().status
            break
        except OSError:
            if time.monotonic() > end:
                raise SystemExit((folder / "log").read_text()) from None
            time.sleep(0.5)
        finally:
            connection.close()
    if status != 200:
        raise SystemExit(f"the gateway answered {status}: {(folder / 'log').read_text()}")


def settled_seconds(process: psutil.Process, pause: float = 5) -> float:
    """As `tree_seconds`, once nothing works any more: further workers may still be starting."""
    before, now = -1.0, tree_seconds(process)
    while now - before > 0.02 * pause:
        time.sleep(pause)
        before, now = now, tree_seconds(process)
    return now


def tree_seconds(process: psutil.Process) -> float:
    """User and system seconds of a process and of its living descendants."""
    times = [member.cpu_times() for member in (process, *process.children(recursive=True))]
    return sum(t.user + t.system for t in times)


WORK: dict[str, Callable[[Path, Path], float]] = {"purify": purify, "evaluate": evaluate, "gateway": gateway}

if __name__ == "__main__":
    main()
