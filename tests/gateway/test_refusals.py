"""The gateway fails closed: what it refuses or cannot purify reaches nobody."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
import torch

from codefend.gateway.worker import WARM_UP_SIDE
from gateway_kit import CHAT, Invert, Upstream, chat, gateway, image, png, run

A, B = png(1), png(2)


def bomb() -> bytes:
    """A PNG header that claims 40,000 x 40,000 pixels."""
    import struct
    import zlib

    head = b"IHDR" + struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


REFUSALS: list[tuple[Any, dict[str, Any], int, str]] = [
    (chat(A, B, A), {"max_images": 2}, 413, "too_many_images"),
    (chat(A), {"max_image_bytes": 100}, 413, "image_too_large"),
    (chat(bomb()), {}, 413, "image_too_large"),
    (chat(png(height=2, width=400)), {}, 400, "invalid_image"),
    (chat(b"GIF89a"), {}, 400, "invalid_image"),
    (chat(b"%PDF-1.7"), {}, 400, "invalid_image"),
    (chat(A[:60]), {}, 400, "invalid_image"),
    (chat(b""), {}, 400, "invalid_image"),
    (chat(A), {"max_body_bytes": 200}, 413, "body_too_large"),
    ({"messages": [{"content": [{"type": "image_url", "image_url": "https://example.org/a.png"}]}]}, {}, 400, "remote"),
    ({"messages": [{"content": [{"type": "image_url", "image_url": "file:///etc/passwd"}]}]}, {}, 400, "remote"),
    ({"messages": [{"content": [{"type": "image_url", "image_url": "AAAA"}]}]}, {}, 400, "remote"),
    ({"messages": [{"content": [{"type": "image_url", "image_url": "data:image/png,xyz"}]}]}, {}, 400, "invalid_image"),
    ({"messages": [{"content": [{"type": "image_url", "image_url": "data:image/png;base64,*"}]}]}, {}, 400, "invalid"),
    ({"messages": [{"content": [{"type": "video_url", "video_url": "x"}]}]}, {}, 400, "unknown_content"),
]


@pytest.mark.parametrize(("body", "flags", "status", "code"), REFUSALS)
def test_refusals_are_clear_and_reach_nobody(body: Any, flags: dict[str, Any], status: int, code: str) -> None:
    async def work() -> None:
        upstream = Upstream()
        async with gateway(upstream, **flags) as client:
            answer = await client.post(CHAT, json=body)
            metrics = (await client.get("/metrics")).text
        error = answer.json()["error"]
        assert (answer.status_code, error["code"].startswith(code)) == (status, True), answer.text
        assert 10 < len(error["message"]) < 250
        assert "iVBOR" not in answer.text
        assert answer.headers["x-codefend-status"] == "refused"
        assert not upstream.requests
        assert f'codefend_refused_total{{code="{error["code"]}"}} 1.0' in metrics

    run(work())


@pytest.mark.parametrize(
    ("path", "headers", "content", "status"),
    [
        (CHAT, {"content-type": "text/plain"}, b"{}", 415),
        (CHAT, {"content-type": "application/json; charset=utf-16"}, b"{}", 415),
        (CHAT, {"content-type": "application/json", "content-encoding": "gzip"}, b"{}", 415),
        (CHAT, {"content-type": "application/json"}, b'{"messages":[],"messages":[]}', 400),
        ("/v1/files", {"content-type": "multipart/form-data; boundary=x"}, A, 403),
        ("/v1/Batches", {"content-type": "application/json"}, b'{"input_file_id": "f"}', 404),
        ("/v1/batches", {"content-type": "application/json"}, b'{"input_file_id": "f"}', 403),
        ("/v1/images/edits", {"content-type": "multipart/form-data; boundary=x"}, A, 404),
        ("/v1/tokenize", {"content-type": "application/json"}, json.dumps(chat(A)).encode(), 400),
        (CHAT + "/", {"content-type": "application/json"}, json.dumps(chat(A)).encode(), 400),
        ("/v1/models/%2e%2e/%2e%2e/pause", {}, b"", 400),
        ("/v1/models/..;/pause", {}, b"", 400),
        ("/v1/models/%252e%252e/pause", {}, b"", 400),
        ("/v1/models//y", {}, b"", 400),
        ("/v1/models/%0a/y", {}, b"", 404),
    ],
)
def test_what_cannot_be_looked_into_is_not_passed_on(
    path: str, headers: dict[str, str], content: bytes, status: int
) -> None:
    async def work() -> None:
        upstream = Upstream()
        async with gateway(upstream, routes="chat,models,tokenize") as client:
            answer = await client.post(path, content=content, headers=headers)
        assert answer.status_code == status, answer.text
        assert answer.json()["error"]["code"]
        assert not upstream.requests

    run(work())


def test_uploads_pass_where_the_operator_allows_them() -> None:
    async def work() -> None:
        upstream = Upstream()
        async with gateway(upstream, allow_uploads=True) as client:
            kind = {"content-type": "multipart/form-data; boundary=x"}
            answer = await client.post("/v1/files", files={"file": ("a.pdf", b"%PDF-1.7")}, data={"purpose": "x"})
            chat_answer = await client.post(CHAT, content=b"--x--", headers=kind)
        assert (answer.status_code, chat_answer.status_code) == (200, 415)

    run(work())


def test_image_links_pass_as_text_where_the_operator_allows_them() -> None:
    async def work() -> list[int]:
        upstream, statuses = Upstream(), []
        for flags in ({}, {"allow_image_links": True}):
            async with gateway(upstream, **flags) as client:
                for address in ("https://example.org/a.png", "data:image/png;base64,AAAA"):
                    body = chat(A, text=f"what? ![]({address})")
                    statuses.append((await client.post(CHAT, json=body)).status_code)
        return statuses

    assert run(work()) == [400, 400, 200, 400]


def test_unknown_routes_are_json_errors() -> None:
    async def work() -> None:
        async with gateway(Upstream()) as client:
            answer = await client.get("/admin")
            wrong = await client.get("/page/purify")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
        assert (wrong.status_code, wrong.json()["error"]["code"]) == (405, "method_not_allowed")

    run(work())


# --- when the purifier fails ------------------------------------------------------------------------------------------


class Failing(Invert):
    """Works when warmed up, then fails: on every image, or only on those that are not the canary's size."""

    def __init__(self, fault: Any, *, spare_canary: bool = False) -> None:
        super().__init__()
        self.fault, self.spare_canary, self.warm = fault, spare_canary, False

    def forward(self, images: torch.Tensor, *, generator: Any = None) -> torch.Tensor:
        if not self.warm or (self.spare_canary and images.shape[-1] == WARM_UP_SIDE):
            self.warm = True
            return images
        if isinstance(self.fault, BaseException):
            raise self.fault
        return self.fault(images)


def slow(images: torch.Tensor) -> torch.Tensor:
    import time

    time.sleep(1.0)
    return images


FAULTS: list[Any] = [
    RuntimeError("broken"),
    ValueError("shape"),
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory"),
    KeyError("x"),
    OSError(5, "device"),
    AssertionError(),
    StopIteration(),
    SystemExit(3),
    KeyboardInterrupt(),
    asyncio.CancelledError(),
    lambda images: images * torch.nan,
    lambda images: images[..., :-1],
    lambda images: None,
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: type(f).__name__)
@pytest.mark.parametrize("on_error", ["block", "fallback", "pass"])
def test_no_failure_of_the_purifier_opens_the_gate(fault: Any, on_error: str) -> None:
    async def work() -> None:
        upstream = Upstream()
        flags = {"on_error": on_error, "fallback": "blur"}
        async with gateway(upstream, purifier=Failing(fault), **flags) as client:
            answer = await client.post(CHAT, json=chat(A, B))
            metrics = (await client.get("/metrics")).text
        assert not upstream.received(A, B), "not even a bypass sends the original bytes"
        if on_error == "block":
            assert answer.status_code == 500
            assert answer.json()["error"]["code"] == "purification_failed"
            assert not upstream.requests
            assert "codefend_bypass_total{" not in metrics
            return
        assert answer.status_code == 200
        assert answer.headers["x-codefend-status"] == "bypassed"
        assert answer.headers["x-codefend-bypass"].count(",") == 1
        assert sum(float(line.split()[1]) for line in metrics.splitlines() if line.startswith("codefend_bypass_t")) == 2
        same = torch.equal(torch.stack(upstream.images()), torch.stack([image(1), image(2)]))
        assert same == (on_error == "pass")

    run(work())


@pytest.mark.parametrize("fault", [RuntimeError("broken"), slow], ids=["exception", "timeout"])
@pytest.mark.parametrize("on_error", ["fallback", "pass"])
def test_no_sender_can_choose_the_bypass(fault: Any, on_error: str) -> None:
    """An image on which the purifier fails, while it purifies others, is refused."""

    async def work() -> None:
        upstream = Upstream()
        flags: dict[str, Any] = {"on_error": on_error, "fallback": "blur"}
        if fault is slow:
            flags["purify_timeout_s"] = 0.5
        async with gateway(upstream, purifier=Failing(fault, spare_canary=True), **flags) as client:
            answer = await client.post(CHAT, json=chat(A))
            metrics = (await client.get("/metrics")).text
        assert answer.json()["error"]["code"] in ("purification_failed", "purification_timeout")
        assert not upstream.requests
        assert "codefend_bypass_total{" not in metrics

    run(work())


def test_a_purifier_that_cannot_even_warm_up_stops_the_start() -> None:
    class Broken(Invert):
        def forward(self, images: torch.Tensor, *, generator: Any = None) -> torch.Tensor:
            raise RuntimeError

    async def work() -> None:
        async with gateway(Upstream(), purifier=Broken()):
            pass

    with pytest.raises(Exception, match="RuntimeError in purifier invert"):
        run(work())
