"""`codefend serve` as a process of its own: what it says, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx2
import pytest

from gateway_kit import CHAT, chat, png, served, wait_for

COMMAND = [sys.executable, "-c", "import sys; from codefend.cli import main; sys.exit(main())", "serve"]


def environment(**extra: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"} | extra


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "variables", "words"),
    [
        ([], {}, "upstream is missing: give --upstream or CODEFEND_UPSTREAM"),
        (["--upstream", "ftp://x"], {}, "expected http(s)://host"),
        (["--upstream", "http://x", "--purifier", "jpeg", "--policy", "block"], {}, "policy block needs a threshold"),
        (["--upstream", "http://x", "--purifier", "brigde"], {}, "did you mean 'bridge'"),
        (["--upstream", "http://x", "--device", "cuda:77"], {}, "this device is not available"),
        (["--upstream", "http://x"], {"CODEFEND_UPSTRAEM": "http://x"}, "did you mean CODEFEND_UPSTREAM?"),
        (["--upstream", "http://x"], {"CODEFEND_API_KEYS": "short"}, "at least 8 characters"),
        (["--upstream", "http://x"], {"OTEL_TRACES_EXPORTER": "zipkin"}, "choose console, otlp or none"),
    ],
)
def test_a_wrong_configuration_is_one_line_and_exit_2(flags: list[str], variables: dict[str, str], words: str) -> None:
    done = subprocess.run(COMMAND + flags, env=environment(**variables), capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = (line for line in done.stderr.splitlines() if not line.startswith("{"))
    assert line.startswith("error: ")
    assert words in line


async def slow_upstream(scope: Any, receive: Any, send: Any) -> None:
    import asyncio

    if scope["type"] == "lifespan":
        return
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    BODIES.append(body)
    await asyncio.sleep(1.5)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"{}"})


BODIES: list[bytes] = []


@pytest.mark.slow
def test_a_served_process_reloads_on_sighup_and_drains_on_sigterm(tmp_path: Path) -> None:
    original, keys = png(1, height=64, width=64), tmp_path / "keys"
    keys.write_text("opened-sesame")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with served(slow_upstream) as model, httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:  # type: ignore[arg-type]
        flags = ["--upstream", model, "--purifier", "blur", "--port", str(port), "--lame-duck-s", "1"]
        variables = environment(OTEL_TRACES_EXPORTER="console", CODEFEND_API_KEYS_FILE=str(keys))
        process = subprocess.Popen(
            COMMAND + flags, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            wait_for(lambda: ready(client, process), 120)
            answers: list[httpx2.Response] = []
            key = {"authorization": "Bearer sesame-open", "x-request-id": "r-1"}
            keys.write_text("sesame-open")
            process.send_signal(signal.SIGHUP)
            wait_for(lambda: client.get("/page/info", headers=key).status_code == 200)
            assert client.get("/page/info", headers={"x-api-key": "opened-sesame"}).status_code == 401
            assert client.get("/page/info", headers=key | {"host": "evil.test"}).status_code == 421
            asking = threading.Thread(
                target=lambda: answers.append(client.post(CHAT, json=chat(original), headers=key))
            )
            asking.start()
            wait_for(lambda: BODIES)
            process.send_signal(signal.SIGTERM)
            wait_for(lambda: client.get("/readyz").status_code == 503)
            assert client.get("/healthz").status_code == 200, "a lame duck still answers"
            asking.join(30)
            out, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0
    assert answers[0].status_code == 200
    assert original not in BODIES[0]
    lines = [json.loads(line) for line in errors.splitlines()]
    assert [line["message"] for line in lines][:2] == ["starting", "listening"]
    (request,) = (line for line in lines if line["message"] == "request" and line.get("images"))
    assert "settings reloaded" in [line["message"] for line in lines]
    assert (request["request_id"], request["status"], request["images"]) == ("r-1", 200, 1)
    assert "sesame" not in errors + out
    assert '"name": "codefend.purify"' in out
    assert '"name": "codefend.upstream"' in out


def ready(client: httpx2.Client, process: subprocess.Popen[str]) -> bool:
    assert process.poll() is None
    try:
        return client.get("/readyz").status_code == 200
    except httpx2.ConnectError:
        return False
