"""The gateway behind a real Ray Serve purifies images, and two replicas agree on them."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any, ClassVar

import httpx2
import pytest
from ray import serve

from codefend.integrations.ray_serve import deployment
from codefend.types import CodefendError
from gateway_kit import png

pytestmark = [pytest.mark.filterwarnings("ignore")]
ANSWER = {
    "id": "1",
    "object": "chat.completion",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "a"}}],
}


class Upstream(BaseHTTPRequestHandler):
    bodies: ClassVar[list[Any]] = []

    def do_POST(self) -> None:
        self.bodies.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        body = json.dumps(ANSWER).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None: ...


@pytest.fixture
def upstream() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Upstream)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("cluster")
def test_two_replicas_on_ray_serve_purify_alike(upstream: str) -> None:
    settings = {"upstream": upstream, "noise_secret": "s" * 16, "purifier": "bridge:sigma=0.1", "isolate": False}
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": 8899})
        serve.run(deployment(settings, num_replicas=2), route_prefix="/")
        image = f"data:image/png;base64,{base64.b64encode(png()).decode()}"
        content = [{"type": "text", "text": "what?"}, {"type": "image_url", "image_url": {"url": image}}]
        body = {"model": "m", "messages": [{"role": "user", "content": content}]}
        for _ in range(20):
            answer = httpx2.post("http://127.0.0.1:8899/v1/chat/completions", json=body, timeout=60)
            assert answer.status_code == 200, answer.text
    finally:
        serve.shutdown()
    purified = {body["messages"][0]["content"][1]["image_url"]["url"] for body in Upstream.bodies}
    assert len(purified) == 1
    assert purified != {image}


def test_replicas_without_a_common_secret_are_refused() -> None:
    with pytest.raises(CodefendError, match="replicas need a noise_secret"):
        deployment({"upstream": "http://localhost:1/v1"})
