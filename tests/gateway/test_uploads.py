"""Uploads, where they are allowed: images are purified as files and in batches."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from codefend.core import images
from codefend.gateway.forms import read_form
from gateway_kit import CHAT, Invert, Upstream, b64, chat, gateway, image, png, run, url

A, B = png(1), png(2)


async def upload(upstream: Upstream, content: bytes, purpose: str, **flags: Any) -> Any:
    async with gateway(upstream, allow_uploads=True, **flags) as client:
        files = {"file": ("a.bin", content, "application/octet-stream")}
        return await client.post("/v1/files", files=files, data={"purpose": purpose})


def file_received(upstream: Upstream) -> bytes:
    request = upstream.requests[-1]
    form = read_form(request.headers["content-type"], request.content)
    return next(part.content for part in form.parts if part.is_file)


def line(body: Any, url: str = CHAT, method: str = "POST") -> bytes:
    return json.dumps({"custom_id": "1", "method": method, "url": url, "body": body}).encode()


def test_an_uploaded_image_is_purified() -> None:
    upstream = Upstream()
    assert run(upload(upstream, A, "vision")).status_code == 200
    assert not upstream.received(A)
    torch.testing.assert_close(images.load(file_received(upstream)).pixels, 1 - image(1))


def test_images_of_uploads_are_counted_and_reported() -> None:
    source = {"type": "base64", "media_type": "image/png", "data": b64(B)}
    params = {"model": "m", "messages": [{"role": "user", "content": [{"type": "image", "source": source}]}]}

    async def work() -> None:
        async with gateway(Upstream(), allow_uploads=True) as client:

            async def send(content: bytes, purpose: str) -> Any:
                return await client.post("/v1/files", files={"file": ("a", content)}, data={"purpose": purpose})

            batch = await send(line(chat(A, B)) + b"\n" + line(chat(A)), "batch")
            messages = await client.post(
                "/v1/messages/batches", json={"requests": [{"custom_id": "1", "params": params}]}
            )
            file, text = await send(png(3), "vision"), await send(b"a text", "assistants")
            metrics = (await client.get("/metrics")).text
        assert [batch.headers[f"x-codefend-{name}"] for name in ("status", "images", "cache")] == [
            "purified",
            "3",
            "miss,miss,hit",
        ]
        assert [messages.headers[f"x-codefend-{name}"] for name in ("status", "cache")] == ["purified", "hit"]
        assert [file.headers[f"x-codefend-{name}"] for name in ("status", "cache")] == ["purified", "miss"]
        assert "x-codefend-status" not in text.headers
        for text_line in (
            'codefend_images_total{result="purified"} 3.0',
            'codefend_images_total{result="cached"} 2.0',
            "codefend_score_count 3.0",
        ):
            assert text_line in metrics, text_line

    run(work())


def test_a_bypass_in_a_batch_is_reported() -> None:
    class Broken(Invert):
        def forward(self, images: torch.Tensor, *, generator: Any = None) -> torch.Tensor:
            if self.batches:  # not the warm-up
                raise RuntimeError("broken")
            return super().forward(images)

    answer = run(upload(Upstream(), line(chat(A)), "batch", purifier=Broken(), on_error="pass"))
    assert (answer.headers["x-codefend-status"], answer.headers["x-codefend-bypass"]) == ("bypassed", "exception")


def test_the_headers_of_a_large_batch_stay_small() -> None:
    batch = b"\n".join([line(chat(A))] * 200)
    answer = run(upload(Upstream(), batch, "batch", scores="exact"))
    assert answer.headers["x-codefend-images"] == "200"
    assert sum(len(name) + len(value) for name, value in answer.headers.raw) < 1000


def test_an_upload_is_sent_once_where_answers_are_voted_on() -> None:
    class Noise(Invert):
        stochastic = True

    upstream = Upstream()
    assert run(upload(upstream, line(chat(A)), "batch", purifier=Noise(), votes=3)).status_code == 200
    assert len(upstream.requests) == 1


def test_other_files_pass_as_they_are() -> None:
    upstream = Upstream()
    assert run(upload(upstream, b"%PDF-1.7 \r\n\r\n any bytes \0", "assistants")).status_code == 200
    assert file_received(upstream) == b"%PDF-1.7 \r\n\r\n any bytes \0"


def test_only_the_routes_of_uploads_take_files() -> None:
    async def work() -> None:
        upstream = Upstream()
        flags: dict[str, Any] = {"allow_uploads": True, "routes": "transcription,/v1/images/edits"}
        async with gateway(upstream, **flags) as client:
            for path in ("/v1/images/edits", "/v1/audio/transcriptions"):
                answer = await client.post(path, files={"image": ("a.png", A, "image/png")})
                assert answer.status_code in (400, 415)
        assert not upstream.requests

    run(work())


def test_the_images_of_a_batch_are_purified() -> None:
    upstream = Upstream()
    batch = line(chat(A)) + b"\n\n" + line({"model": "m", "input": "a text"}, "/v1/embeddings") + b"\n" + line(chat(B))
    assert run(upload(upstream, batch, "batch")).status_code == 200
    assert not upstream.received(A, B)
    requests = [json.loads(text) for text in file_received(upstream).splitlines()]
    assert [request["url"] for request in requests] == [CHAT, "/v1/embeddings", CHAT]
    urls = [requests[i]["body"]["messages"][0]["content"][1]["image_url"]["url"] for i in (0, 2)]
    for data_url, seed in zip(urls, (1, 2), strict=True):
        torch.testing.assert_close(images.load(data_url).pixels, 1 - image(seed))


@pytest.mark.parametrize(
    "content",
    [
        json.dumps({"purpose": purpose, "filename": "a.jsonl", "bytes": 9, "mime_type": "text/jsonl"}).encode()
        for purpose in ("batch", "batch-api", "Batch", "batch ", "vision", "", None, ["batch"])
    ]
    + [b"", b"[]", b"{}", b'{"purpose": "user_data", "Purpose": "batch"}'],
)
def test_uploads_in_parts_hold_no_images_and_no_batches(content: bytes) -> None:
    async def work() -> None:
        upstream = Upstream()
        async with gateway(upstream, allow_uploads=True) as client:
            answer = await client.post("/v1/uploads", content=content, headers={"content-type": "application/json"})
        assert answer.status_code == 400, answer.text
        assert not upstream.requests

    run(work())


def test_uploads_in_parts_of_other_files_pass() -> None:
    async def work() -> None:
        upstream = Upstream()
        async with gateway(upstream, allow_uploads=True) as client:
            body = {"purpose": "user_data", "filename": "a.pdf", "bytes": 9, "mime_type": "application/pdf"}
            assert (await client.post("/v1/uploads", json=body)).status_code == 200
            part = await client.post("/v1/uploads/u_1/parts", files={"data": ("a", b"%PDF")})
            assert part.status_code == 200
            assert (await client.post("/v1/uploads/u_1/complete", json={"part_ids": ["p"]})).status_code == 200
            for path in ("/v1/uploads", "/v1/batches", "/v1/messages/batches"):
                form = await client.post(path, data={"purpose": "batch"}, files={"file": ("a", line(chat(A)))})
                assert form.status_code == 415, path
        assert len(upstream.requests) == 3

    run(work())


@pytest.mark.parametrize(
    ("fields", "files"),
    [
        ({}, {"purpose": ("p", b"batch")}),
        ({"purpose": "assistants"}, {"purpose": ("p", b"batch")}),
        ({"purpose": ["assistants", "batch"]}, {}),
        ({"purpose": ["batch", "batch"]}, {}),
        ({"purpose": "Batch"}, {}),
        ({"purpose": "batch "}, {}),
        ({"purpose": "assistants"}, {"data": ("a", b"any")}),
        ({"purpose": "assistants", "file": "any"}, {}),
        ({}, {}),
    ],
)
def test_a_form_with_an_unclear_purpose_is_refused(fields: Any, files: Any) -> None:
    async def work() -> None:
        upstream = Upstream()
        async with gateway(upstream, allow_uploads=True) as client:
            form = {"file": ("a.jsonl", line(chat(A)))} | files
            answer = await client.post("/v1/files", data=fields, files=form)
        assert answer.status_code == 400, answer.text
        assert not upstream.requests

    run(work())


def test_a_purpose_of_batches_under_another_name_counts_as_one() -> None:
    upstream = Upstream()
    assert run(upload(upstream, line(chat(A)), "batch-api")).status_code == 200
    assert not upstream.received(A)


def test_the_images_of_a_batch_of_messages_are_purified() -> None:
    async def work() -> None:
        upstream = Upstream()
        source = {"type": "base64", "media_type": "image/png", "data": b64(A)}
        params = {"model": "m", "messages": [{"role": "user", "content": [{"type": "image", "source": source}]}]}
        async with gateway(upstream, allow_uploads=True) as client:
            path = "/v1/messages/batches"
            good = await client.post(path, json={"requests": [{"custom_id": "1", "params": params}]})
            bad = await client.post(path, json={"requests": [{"custom_id": "1", "params": params, "image": url(A)}]})
        assert (good.status_code, bad.status_code) == (200, 400)
        assert not upstream.received(A)
        torch.testing.assert_close(upstream.images()[0], 1 - image(1))

    run(work())


@pytest.mark.parametrize(
    ("content", "purpose", "flags", "code"),
    [
        (A[:60], "vision", {}, "invalid_image"),
        (b"\0\0\0\x20ftypavif" + bytes(99), "vision", {}, "invalid_image"),
        (b"\0\0\0\x18ftypheic" + bytes(99), "vision", {}, "invalid_image"),
        (b"\xff\x0a" + bytes(99), "vision", {}, "invalid_image"),
        (b"<?xml version='1.0'?>\n<svg xmlns='http://www.w3.org/2000/svg'/>", "vision", {}, "invalid_image"),
        (png(3, shade=0.8), "vision", {"policy": "block", "threshold": 0.5}, "image_blocked"),
        (line(chat(A)) + b"\n" + line(chat(A), "/v1/fine_tuning/jobs"), "batch", {}, "unknown_route"),
        (line(chat(A), method="DELETE"), "batch", {}, "unknown_route"),
        (line(chat(b"junk")), "batch", {}, "invalid_image"),
        (line({"messages": [{"role": "user", "content": [{"type": "video_url"}]}]}), "batch", {}, "unknown_content"),
        (b'{"custom_id": "1", "url": "/v1/chat/completions", "body": {}}', "batch", {}, "invalid_request"),
        (A, "batch", {}, "invalid_json"),
    ],
)
def test_what_cannot_be_purified_is_not_uploaded(content: bytes, purpose: str, flags: Any, code: str) -> None:
    upstream = Upstream()
    answer = run(upload(upstream, content, purpose, **flags))
    assert answer.json()["error"]["code"] == code, answer.text
    assert not upstream.requests
