"""The guardrail in LiteLLM's real proxy, as a user would configure it, before a capturing upstream.

Slow, and LiteLLM pins versions of its own: run it in an environment that has both (`pip install 'litellm[proxy]'`).
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from codefend.core import images
from gateway_kit import Upstream, b64, chat, image, png, served, url, wait_for

pytest.importorskip("litellm.proxy.proxy_cli", reason="LiteLLM's proxy is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore")]
A = png(1, height=64, width=64)
BLOCK = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": b64(A)}}
COMPLETION = {
    "id": "c",
    "object": "chat.completion",
    "created": 0,
    "model": "m",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
}


def capturing(upstream: Upstream) -> Starlette:
    async def answer(request: Request) -> Response:
        raw = await request.body()
        upstream.requests.append(httpx2.Request("POST", str(request.url), content=raw))
        if not json.loads(raw).get("stream"):
            return JSONResponse(COMPLETION)
        delta = {"index": 0, "delta": {"content": "hi"}, "finish_reason": "stop"}
        chunk = COMPLETION | {"object": "chat.completion.chunk", "choices": [delta]}
        return Response(f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n", media_type="text/event-stream")

    return Starlette(routes=[Route("/{path:path}", answer, methods=["POST"])])


@pytest.fixture(scope="module")
def upstream() -> Upstream:
    return Upstream()


@pytest.fixture(scope="module")
def proxy(upstream: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("litellm")
    with served(capturing(upstream)) as model:
        process = start(folder, port, model)
        lines: list[str] = []
        threading.Thread(target=lambda: lines.extend(process.stdout), daemon=True).start()  # type: ignore[arg-type]

        def ready() -> bool:
            assert process.poll() is None, "".join(lines)[-3000:]
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) == 0

        try:
            wait_for(ready, 300)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()
            process.wait()


def start(folder: Path, port: int, model: str) -> subprocess.Popen[str]:
    rail = {"guardrail": "codefend.integrations.litellm.CodefendGuardrail", "mode": "pre_call", "default_on": True}
    upstream = {"model": "openai/m", "api_base": f"{model}/v1", "api_key": "none"}
    config = {
        "model_list": [{"model_name": "m", "litellm_params": upstream}],
        "guardrails": [{"guardrail_name": "codefend", "litellm_params": rail}],
        "router_settings": {"disable_cooldowns": True, "num_retries": 0},  # what the toy answers is not always its form
    }
    (folder / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    environment = os.environ | {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "OMP_NUM_THREADS": "1"}
    environment["LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY"] = "true"  # on 127.0.0.1, for this test
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = "from litellm.proxy.proxy_cli import run_server; run_server()"
    flags = f"--config {folder}/config.yaml --host 127.0.0.1 --port {port} --telemetry False".split()
    return subprocess.Popen(
        [sys.executable, "-c", command, *flags],
        env=environment,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def shaped(api: str) -> tuple[str, dict[str, Any]]:
    if api == "chat":
        return "/v1/chat/completions", chat(A)
    if api == "messages":
        body = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": [BLOCK]}]}
        return "/v1/messages", body
    part = {"type": "input_image", "image_url": url(A), "detail": "auto"}
    return "/v1/responses", {"model": "m", "input": [{"role": "user", "content": [part]}]}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("api", ["chat", "messages", "responses"])
def test_no_original_gets_through_litellms_proxy(api: str, stream: bool, proxy: str, upstream: Upstream) -> None:
    upstream.requests.clear()
    path, body = shaped(api)
    answer = httpx2.post(f"{proxy}{path}", json=body | {"stream": stream}, timeout=120)
    assert upstream.requests, answer.text
    assert not upstream.received(A), "the guardrail's images were not used"
    (received,) = upstream.images()
    assert received.shape == image(1, height=64, width=64).shape
    assert not torch.equal(received, images.load(A).pixels)


def test_what_cannot_be_inspected_is_an_error_and_no_call(proxy: str, upstream: Upstream) -> None:
    upstream.requests.clear()
    for part in (
        {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
        {"type": "video_url", "video_url": {"url": url(A)}},
    ):
        body = {"model": "m", "messages": [{"role": "user", "content": [part]}]}
        answer = httpx2.post(f"{proxy}/v1/chat/completions", json=body, timeout=120)
        assert answer.status_code == 400, answer.text
    assert not upstream.requests


def test_images_elsewhere_in_a_call_are_an_error_and_texts_there_are_none(proxy: str, upstream: Upstream) -> None:
    upstream.requests.clear()
    messages = chat(A)["messages"]
    for aside in ({"fallbacks": [{"model": "m", "messages": messages}]}, {"extra_body": {"messages": messages}}):
        answer = httpx2.post(f"{proxy}/v1/chat/completions", json=chat() | aside, timeout=120)
        assert answer.status_code == 400, answer.text
    assert not upstream.requests
    plain = chat() | {"metadata": {"image": "kitchen"}, "fallbacks": [{"model": "m", "messages": chat()["messages"]}]}
    answer = httpx2.post(f"{proxy}/v1/chat/completions", json=plain, timeout=120)
    assert answer.status_code == 200, answer.text
