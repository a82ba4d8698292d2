"""AVIF is not decoded, so it is refused wherever a request may hold it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import httpx2
import pytest
from PIL import Image

from codefend.gateway.app import create_app
from gateway_kit import CHAT, Invert, Upstream, b64, gateway, run, settings, url

RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
REMOTE = "https://a.test/x.avif"


def avif(**options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((64, 48), 50).convert("RGB").save(buffer, "AVIF", **options)
    return buffer.getvalue()


AVIF = avif()


def user(*parts: Any, key: str = "messages") -> dict[str, Any]:
    return {"model": "m", key: [{"role": "user", "content": list(parts)}]}


def block(media_type: str) -> dict[str, Any]:
    return {"type": "image", "source": {"type": "base64", "media_type": media_type, "data": b64(AVIF)}}


FORMS: list[tuple[str, dict[str, Any]]] = [
    (CHAT, user({"type": "image_url", "image_url": {"url": url(AVIF, "avif")}})),
    (CHAT, user({"type": "image_url", "image_url": {"url": url(AVIF, "png")}})),
    (CHAT, user({"type": "image_url", "image_url": {"url": REMOTE}})),
    (CHAT, user({"type": "image_url", "image_url": {"url": url(avif(quality=100, subsampling="4:4:4"), "avif")}})),
    (CHAT, {"model": "m", "messages": [{"role": "user", "content": "what?", "images": [b64(AVIF)]}]}),
    (CHAT, user({"type": "text", "text": f"what is ![this]({url(AVIF, 'avif')})"})),
    (CHAT, user({"type": "text", "text": f"<img>{b64(AVIF)}</img>"})),
    (CHAT, user() | {"extra": {"any": b64(AVIF)}}),
    (RESPONSES, user({"type": "input_image", "image_url": url(AVIF, "avif")}, key="input")),
    (RESPONSES, {"model": "m", "input": [{"type": "image_generation_call", "id": "1", "result": b64(AVIF)}]}),
    (MESSAGES, user(block("image/avif"))),
    (MESSAGES, user(block("image/png"))),
    (MESSAGES, user({"type": "tool_result", "tool_use_id": "1", "content": [block("image/avif")]})),
]


@pytest.mark.parametrize(("path", "body"), FORMS)
def test_avif_is_refused_in_every_form(path: str, body: dict[str, Any]) -> None:
    async def resolver(host: str) -> Sequence[str]:
        return ["93.184.215.14"]

    async def work() -> None:
        upstream = Upstream()
        remote = httpx2.MockTransport(lambda request: httpx2.Response(200, content=AVIF))
        options = settings(allow_remote_images=True)
        transports = {"transport": upstream.transport, "fetch_transport": remote}
        app = create_app(options, purifier=Invert(), resolver=resolver, **transports)
        async with gateway(upstream, app=app) as client:
            answer = await client.post(path, json=body)
        assert answer.status_code == 400, answer.text
        message = answer.json()["error"]["message"]
        assert "image" in message
        assert 20 < len(message) < 250
        assert not upstream.requests

    run(work())
