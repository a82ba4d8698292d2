"""A transcript of the gateway as a process: requests to it, its requests to the upstream, and its responses."""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from PIL import Image

from goldens import kit

KEY = "golden-key-1"
CHAT, JSON = "/v1/chat/completions", {"content-type": "application/json"}
AUTHORIZED = JSON | {"authorization": f"Bearer {KEY}"}
SETTINGS = {  # by environment: the spelling of flags may change, these names are a contract
    "CODEFEND_PURIFIER": "bridge-detail",
    "CODEFEND_API_KEYS": KEY,
    "CODEFEND_UPSTREAM_API_KEY": "upstream-key",
    "CODEFEND_MAX_BODY_BYTES": "60000",
    "CODEFEND_MAX_PIXELS": "4000",
    "CODEFEND_MAX_IMAGES": "2",
    "CODEFEND_ALLOW_OVERRIDE": "true",
    "CODEFEND_PROMPT": "text-is-data",
    "CODEFEND_SCORES": "exact",  # the default when the golden was recorded; clients see none now
}
DATA_URL = re.compile(r"data:image/[a-z]+;base64,[A-Za-z0-9+/=]+")
CONTRACT = ("content-type", "retry-after", "www-authenticate", "x-upstream", "allow")  # besides x-codefend-*
ONWARD = ("authorization", "x-api-key", "content-type", "x-custom", "x-codefend-policy", "anthropic-version")


# --- both ends -------------------------------------------------------------------------------------------------------


@dataclass
class Upstream:
    """A server that records its requests."""

    requests: list[dict[str, Any]] = field(default_factory=list)
    url: str = ""

    @contextlib.contextmanager
    def serving(self) -> Iterator[Upstream]:
        requests = self.requests

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                headers = {name.lower(): value for name, value in self.headers.items()}
                requests.append({"method": self.command, "path": self.path, "headers": headers, "body": body})
                self.reply(json.loads(body) if body[:1] == b"{" else {})

            def reply(self, request: dict[str, Any]) -> None:
                status = 429 if request.get("model") == "busy" else 200
                if request.get("stream"):
                    kind, data = "text/event-stream", b'data: {"n": 1}\n\ndata: [DONE]\n\n'
                else:
                    kind, data = "application/json", json.dumps({"echo": self.path, "ok": status == 200}).encode()
                self.send_response(status)
                for name, value in (("content-type", kind), ("content-length", str(len(data))), ("x-upstream", "yes")):
                    self.send_header(name, value)
                if status == 429:
                    self.send_header("retry-after", "7")
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_DELETE = handle_any

            def log_message(self, *_: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()


@contextlib.contextmanager
def process(upstream: str, settings: dict[str, str], *, patience: float = 120) -> Iterator[int]:
    """``codefend serve`` in a separate process; yields its port once ready. A clean stop is part of the contract."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    module, _, name = kit.entry_point().partition(":")
    code = f"import sys; from {module} import {name}; sys.exit({name}())"
    shared = {"CODEFEND_PRECISION": "float32", "CODEFEND_DEVICE": "cpu", "CODEFEND_ISOLATE": "false"}
    environment = os.environ | shared | {"CODEFEND_TORCH_THREADS": "1", "OMP_NUM_THREADS": "1"} | settings
    command = [sys.executable, "-c", code, "serve", "--upstream", upstream, "--port", str(port)]
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            end = time.monotonic() + patience
            while not _ready(port):
                assert child.poll() is None, f"the gateway died: {_text(log)}"
                assert time.monotonic() < end, f"the gateway is not ready: {_text(log)}"
                time.sleep(0.1)
            yield port
            child.terminate()
            assert child.wait(30) == 0, _text(log)
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()


def _text(log: Any) -> str:
    log.seek(0)
    return str(log.read().decode(errors="replace")[-2000:])


def _ready(port: int) -> bool:
    with contextlib.suppress(OSError, http.client.HTTPException):
        return ask(port, "GET", "/readyz")[0] == 200
    return False


def ask(
    port: int, method: str, path: str, body: object = None, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], bytes]:
    """One request; status, headers and body of the answer."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        connection.request(method, path, body=data, headers=headers or {})
        response = connection.getresponse()
        return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
    finally:
        connection.close()


# --- requests ---------------------------------------------------------------------------------------------------------


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> str:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return base64.b64encode(file.getvalue()).decode()


def chat(*parts: object, **extra: object) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": list(parts)}], "temperature": 0, **extra}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def image_url(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, "detail": "high"}}


def cases() -> dict[str, tuple[Any, ...]]:
    """Name to method, path, body and headers."""
    image = Image.fromarray(kit.input_image())
    png, jpeg = encoded(image), encoded(image, "JPEG", quality=95)
    small, large = image_url(f"data:image/png;base64,{png}"), encoded(image.resize((80, 60)))
    frames = encoded(image, "GIF", save_all=True, append_images=[Image.new("RGB", image.size)])
    claude = {"type": "base64", "media_type": "image/png", "data": png}
    headers = AUTHORIZED | {"x-custom": "kept", "x-request-id": "golden-1"}

    def post(body: object, path: str = CHAT, **more: str) -> tuple[Any, ...]:
        return "POST", path, body, headers | {name.replace("_", "-"): value for name, value in more.items()}

    return {
        "healthz": ("GET", "/healthz", None, {}),
        "readyz": ("GET", "/readyz", None, {}),
        "models": ("GET", "/v1/models", None, headers),
        "nowhere": ("GET", "/nowhere", None, headers),
        "no key": ("POST", CHAT, chat(text("hi")), JSON),
        "wrong key": ("POST", CHAT, chat(text("hi")), JSON | {"authorization": "Bearer wrong-key-1"}),
        "other key header": ("POST", CHAT, chat(text("hi")), JSON | {"x-api-key": KEY}),
        "text": post(chat(text("hi"))),
        "plain text": post({"model": "m", "messages": [{"role": "user", "content": "hi"}]}),
        "image": post(chat(text("what?"), small)),
        "again": post(chat(text("what?"), small)),
        "jpeg": post(chat(image_url(f"data:image/jpeg;base64,{jpeg}"))),
        "streamed": post(chat(text("what?"), small, stream=True)),
        "busy upstream": post(chat(text("hi")) | {"model": "busy"}),
        "responses": post(
            {
                "model": "m",
                "input": [{"role": "user", "content": [{"type": "input_image", "image_url": data_url(png)}]}],
            },
            "/v1/responses",
        ),
        "messages": post(
            {
                "model": "m",
                "max_tokens": 9,
                "messages": [{"role": "user", "content": [{"type": "image", "source": claude}, text("what?")]}],
            },
            "/v1/messages",
            anthropic_version="2023-06-01",
        ),
        "messages refused": post(
            {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": [{"type": "odd"}]}]},
            "/v1/messages",
        ),
        "detect": post(chat(small), x_codefend_policy="detect"),
        "detect above": post(chat(small), x_codefend_policy="detect", x_codefend_threshold="1.5"),
        "block": post(chat(small), x_codefend_policy="block", x_codefend_threshold="0.1"),
        "unknown policy": post(chat(small), x_codefend_policy="hope"),
        "unknown part": post(chat({"type": "hologram", "hologram": {"data": png}})),
        "hidden image": post(chat(text("hi"), extra={"deep": [small]})),
        "image link in text": post(chat(text("see ![x](https://example.test/a.png)"))),
        "data url in text": post(chat(text(f"see ![x](data:image/png;base64,{png})"))),
        "remote image": post(chat(image_url("https://example.test/a.png"))),
        "file url": post(chat(image_url("file:///etc/passwd"))),
        "not an image": post(chat(image_url("data:image/png;base64," + base64.b64encode(b"hello").decode()))),
        "not base64": post(chat(image_url("data:image/png;base64,@@@@"))),
        "animation": post(chat(image_url(f"data:image/gif;base64,{frames}"))),
        "too many pixels": post(chat(image_url(f"data:image/png;base64,{large}"))),
        "too many images": post(chat(small, small, small)),
        "too large": post(chat(text("x" * 70_000))),
        "broken json": post(b'{"model": '),
        "doubled key": post(b'{"model": "m", "model": "n", "messages": []}'),
        "other content": ("POST", CHAT, b"hi", headers | {"content-type": "text/plain"}),
        "compressed": post(chat(text("hi")), content_encoding="gzip"),
        "upload": ("POST", "/v1/files", b"--x", headers | {"content-type": "multipart/form-data; boundary=x"}),
        "page info": ("GET", "/page/info", None, headers),
    }


def data_url(data: str) -> str:
    return f"data:image/png;base64,{data}"


# --- the record -------------------------------------------------------------------------------------------------------


def transcript() -> dict[str, Any]:
    """The response to each case, and the requests that reached the upstream."""
    responses = {}
    with Upstream().serving() as upstream, process(upstream.url, SETTINGS) as port:
        for name, case in cases().items():
            before = len(upstream.requests)
            status, headers, body = ask(port, *case)
            onward = [_onward(request) for request in upstream.requests[before:]]
            responses[name] = {"status": status, "headers": _headers(headers), "body": _body(body), "upstream": onward}
        metrics = ask(port, "GET", "/metrics", None, AUTHORIZED)[2].decode()
    names = sorted({line.split()[2] for line in metrics.splitlines() if line.startswith("# TYPE")})
    return {"cases": responses, "metrics": [name for name in names if name.startswith("codefend")]}


def _headers(headers: dict[str, str]) -> dict[str, Any]:
    stable: dict[str, Any] = {}
    for name, value in headers.items():
        if name == "x-codefend-score":
            stable[name] = [None if part == "-" else float(part) for part in value.split(",")]
        elif name == "x-codefend-ms" or (name == "x-codefend-request-id" and value != "golden-1"):
            stable[name] = "(varies)"
        elif name in CONTRACT or name.startswith("x-codefend-"):
            stable[name] = value
    return stable


def _body(body: bytes) -> Any:
    """The response; for errors without the message, which must be one line."""
    try:
        data = json.loads(body)
    except ValueError:
        return {"text": body.decode(errors="replace")[:200]}
    error = data.get("error") if isinstance(data, dict) else None
    if isinstance(error, dict) and "message" in error:
        code = re.match(r"[a-z_]+(?=: )", error["message"]) if data.get("type") == "error" else None
        error["message"] = f"{code.group() if code else ''} one line" if "\n" not in error["message"] else "many lines"
        if data.get("request_id"):
            data["request_id"] = "(varies)"
    return data


def _onward(request: dict[str, Any]) -> dict[str, Any]:
    headers = {name: request["headers"][name] for name in ONWARD if name in request["headers"]}
    body = json.loads(request["body"]) if request["body"] else None
    return {"method": request["method"], "path": request["path"], "headers": headers, "body": _described(body)}


def _described(value: Any) -> Any:
    """A body whose image files are replaced by descriptions of their pixels."""
    if isinstance(value, dict):
        return {key: _described(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_described(item) for item in value]
    if isinstance(value, str) and DATA_URL.fullmatch(value):
        return {"url": value.partition(",")[0], **_pixels(value.partition(",")[2])}
    if isinstance(value, str) and len(value) > 200 and " " not in value:
        return _pixels(value)
    return value


def _pixels(data: str) -> dict[str, Any]:
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        pixels = np.asarray(image)
        return {
            "format": image.format,
            "mode": image.mode,
            "size": list(image.size),
            "sha256": kit.digest(pixels),
            "mean": float(pixels.mean()),
        }


def without_hashes(value: Any) -> Any:
    """A transcript for another machine than the recorded one: its images are compared by their means."""
    if isinstance(value, dict):
        return {key: without_hashes(item) for key, item in value.items() if key != "sha256"}
    return [without_hashes(item) for item in value] if isinstance(value, list) else value
