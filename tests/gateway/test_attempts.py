"""Attempts to get an original image past the gateway, by what listed upstreams (vLLM, Ollama, OpenAI, ...) would load.

Every attempt is refused, or what it carries arrives purified, or it is text that no upstream takes for an image.
"""

from __future__ import annotations

import gzip
import json
import socket
from typing import Any
from urllib.parse import urlsplit

import pytest

from codefend.gateway.app import create_app
from codefend.gateway.errors import Api, Refused
from codefend.gateway.shapes import Inspection, survey
from codefend.gateway.suspicion import _STEP
from gateway_kit import CHAT, Invert, Upstream, b64, chat, gateway, png, run, served, settings, url

ORIGINAL = png(1, height=32, width=32)  # over 512 characters of base64
IMAGE = {"type": "image_url", "image_url": {"url": url(ORIGINAL)}}
REMOTE = "https://evil.test/a.png"


def user(*parts: Any, **extra: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts), **extra}


def asked(*parts: Any, **extra: Any) -> dict[str, Any]:
    return {"messages": [user(*parts)], **extra}


def responded(*items: Any) -> dict[str, Any]:
    return {"input": list(items)}


SOURCE = {"type": "base64", "media_type": "image/png", "data": b64(ORIGINAL)}
TEXT = {"type": "text", "text": "what?"}
HEIC = b64(b"\0\0\0\x1cftypheic\0\0\0\0mif1heic" + bytes(600))

REFUSED: dict[str, tuple[Api, Any]] = {
    # content parts
    "vLLM's video": ("chat", asked({"type": "video_url", "video_url": {"url": "data:video/jpeg;base64,AAAA"}})),
    "vLLM's embeddings": ("chat", asked({"type": "image_embeds", "image_embeds": {"image_embeds": "AAAA"}})),
    "vLLM's cached image": ("chat", asked({"type": "image_url", "image_url": None, "uuid": "sku-1"})),
    "vLLM's part without a type": ("chat", asked({"image_url": url(ORIGINAL)})),
    "audio by address": ("chat", asked({"type": "audio_url", "audio_url": {"url": REMOTE}})),
    "an uploaded image": ("responses", responded(user({"type": "input_image", "file_id": "file-1"}))),
    "a file in a chat": ("chat", asked({"type": "file", "file": {"file_data": url(ORIGINAL), "filename": "a.png"}})),
    "an image part of another API": ("chat", asked({"type": "input_image", "image_url": url(ORIGINAL)})),
    "an Anthropic image in a chat": ("chat", asked({"type": "image", "source": SOURCE})),
    "Gemini's own part": ("chat", asked({"inlineData": {"mimeType": "image/png", "data": b64(ORIGINAL)}})),
    "Mistral's document": ("chat", asked({"type": "document_url", "document_url": REMOTE})),
    "a part in a part": ("chat", asked({"type": "text", "text": [IMAGE]})),
    "an image as the detail": (
        "chat",
        asked({"type": "image_url", "image_url": {"url": url(ORIGINAL), "detail": IMAGE}}),
    ),
    "a data URL as the detail": (
        "responses",
        responded(user({"type": "input_image", "image_url": "x", "detail": url(ORIGINAL)})),
    ),
    "an image as a signature": (
        "messages",
        asked({"type": "thinking", "thinking": "t", "signature": {"image": SOURCE}}),
    ),
    "an image as redacted thinking": (
        "messages",
        asked({"type": "redacted_thinking", "data": [{"type": "image", "source": SOURCE}]}),
    ),
    "an image that a screenshot tool uploaded": (
        "responses",
        responded({"type": "computer_call_output", "output": {"type": "computer_screenshot", "file_id": "f"}}),
    ),
    # spelling, for parsers that take other cases as equal (Ollama's)
    "Go: content in capitals": ("chat", {"messages": [{"role": "user", "content": "x", "CONTENT": [IMAGE]}]}),
    "Go: messages with a long s": ("chat", {"messages": [], "meſsages": [user(IMAGE)]}),
    "Go: an image part in capitals": ("chat", asked({"type": "image_url", "IMAGE_URL": {"url": url(ORIGINAL)}})),
    "Go: the URL in capitals": (
        "chat",
        asked({"type": "image_url", "image_url": {"url": url(ORIGINAL), "URL": REMOTE}}),
    ),
    "Go: Anthropic's source in capitals": (
        "messages",
        asked({"type": "image", "source": SOURCE | {"Data": b64(ORIGINAL)}}),
    ),
    "Go: input in capitals": ("responses", {"input": "x", "INPUT": [user(IMAGE)]}),
    "Go: tools in capitals": ("messages", {"messages": [], "Tools": [{"type": "web_search_20250305"}]}),
    "Go: a tool's type in capitals": (
        "messages",
        {"messages": [], "tools": [{"Type": "web_search_20250305", "name": "web_search"}]},
    ),
    "a key in camel case": ("chat", {"messages": [{"role": "user", "content": "x", "imageUrl": REMOTE}]}),
    "a key in the plural": ("chat", {"messages": [], "image_urls": [REMOTE]}),
    "a key with hyphens": ("other", {"prompt": "x", "Image-URL": REMOTE}),
    # other fields
    "Ollama's own images": ("chat", {"messages": [{"role": "user", "content": "x", "images": [b64(ORIGINAL)]}]}),
    "llama.cpp's own images": ("other", {"prompt": "[img-1]", "image_data": [{"data": b64(ORIGINAL), "id": 1}]}),
    "vLLM's prompt embeddings": ("other", {"prompt": "x", "prompt_embeds": "AAAA"}),
    "a prediction": ("chat", {"messages": [], "prediction": {"type": "content", "content": [IMAGE]}}),
    "variables of a stored prompt": (
        "responses",
        {"input": "x", "prompt": {"id": "p", "variables": {"v": {"type": "input_image", "image_url": REMOTE}}}},
    ),
    "base64 under a name of its own": ("chat", {"messages": [], "extra_body": {"x": b64(ORIGINAL)}}),
    "base64 of HEIC": ("chat", {"messages": [], "extra_body": {"x": HEIC}}),
    "base64 for URLs": ("other", {"prompt": "_9j_" + "A" * 600}),
    # texts that servers load
    "TGI's Markdown over two parts": (
        "chat",
        asked({"type": "text", "text": "![a"}, IMAGE, {"type": "text", "text": f"]({REMOTE})"}),
    ),
    "TGI's Markdown with a long description": (
        "chat",
        asked({"type": "text", "text": "x" * (_STEP - 9) + "![" + "a" * 70_000 + f"]({REMOTE})"}),
    ),
    "HTML with a long attribute": (
        "chat",
        asked({"type": "text", "text": "x" * (_STEP - 9) + "<img alt='" + "a" * 70_000 + f"' src='{REMOTE}'>"}),
    ),
    "Qwen's tag in a tool's arguments": (
        "chat",
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": f"<img>{REMOTE}</img>"}}]}]},
    ),
    # what the server loads by itself
    "xAI's live search": ("chat", {"messages": [], "search_parameters": {"mode": "on"}}),
    "Qwen's search": ("chat", {"messages": [], "enable_search": True}),
    "Azure's own data": ("chat", {"messages": [], "data_sources": [{"type": "azure_search"}]}),
    "LiteLLM's vector stores": ("chat", {"messages": [], "vector_store_ids": ["v"]}),
    "a tool without a type": ("chat", {"messages": [], "tools": [{"url_context": {}}]}),
    "a tool by its name alone": ("chat", {"messages": [], "tools": ["web_search"]}),
    # embeddings
    "a multimodal embedding": ("texts", {"messages": [user(IMAGE)]}),
    "an embedding of a data URL": ("texts", {"input": [url(ORIGINAL)]}),
    "an embedding of base64": ("texts", {"input": b64(ORIGINAL)}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_attempt_is_refused(name: str) -> None:
    api, body = REFUSED[name]
    with pytest.raises(Refused) as refusal:
        survey(api, body)
    assert refusal.value.status == 400


PURIFIED: dict[str, tuple[str, Any]] = {
    "a URL as text": (CHAT, asked({"type": "image_url", "image_url": url(ORIGINAL)})),
    "a URL as an object": (CHAT, asked({"type": "image_url", "image_url": {"url": url(ORIGINAL), "detail": "high"}})),
    "a wrong media type": (CHAT, asked({"type": "image_url", "image_url": {"url": url(ORIGINAL, "svg+xml")}})),
    "a media type with parameters": (
        CHAT,
        asked({"type": "image_url", "image_url": {"url": "DATA:;x=1;BASE64," + b64(ORIGINAL)}}),
    ),
    "a tool's result in a chat": (
        CHAT,
        {"messages": [{"role": "tool", "tool_call_id": "1", "content": [TEXT, IMAGE]}]},
    ),
    "a system message": (CHAT, {"messages": [{"role": "system", "content": [IMAGE]}, user(TEXT)]}),
    "a function's output": (
        "/v1/responses",
        responded(
            {
                "type": "function_call_output",
                "call_id": "1",
                "output": [{"type": "input_image", "image_url": url(ORIGINAL)}],
            }
        ),
    ),
    "a screenshot": (
        "/v1/responses",
        responded(
            {
                "type": "computer_call_output",
                "call_id": "1",
                "output": {"type": "input_image", "image_url": url(ORIGINAL)},
            }
        ),
    ),
    "a generated image": (
        "/v1/responses",
        responded({"type": "image_generation_call", "id": "1", "result": b64(ORIGINAL)}),
    ),
    "a tool's result in messages": (
        "/v1/messages",
        asked({"type": "tool_result", "tool_use_id": "1", "content": [{"type": "image", "source": SOURCE}]}),
    ),
    "an image in a document": (
        "/v1/messages",
        asked({"type": "document", "source": {"type": "content", "content": [{"type": "image", "source": SOURCE}]}}),
    ),
    "a media type that ends the URL": (
        "/v1/messages",
        asked({"type": "image", "source": SOURCE | {"media_type": f"image/png;base64,{b64(ORIGINAL)}#"}}),
    ),
}


@pytest.mark.parametrize("name", PURIFIED)
def test_an_image_in_an_unusual_place_or_form_is_purified(name: str) -> None:
    path, body = PURIFIED[name]

    async def work() -> None:
        upstream = Upstream()
        async with gateway(upstream) as client:
            answer = await client.post(path, json={"model": "m", **body})
        assert (answer.status_code, answer.headers.get("x-codefend-images")) == (200, "1"), answer.text
        assert not upstream.received(ORIGINAL)

    run(work())


@pytest.mark.parametrize(
    ("api", "body"),
    [
        (
            "chat",
            {
                "messages": [
                    {"role": "assistant", "tool_calls": [{"function": {"arguments": json.dumps({"image": url(b"x")})}}]}
                ]
            },
        ),
        ("chat", {"messages": [{"role": "user", "content": f"what is at {REMOTE} and in {url(b'x')}?"}]}),
        ("messages", asked({"type": "tool_use", "id": "1", "name": "show", "input": {"image_url": REMOTE}})),
    ],
)
def test_addresses_in_arguments_and_prose_are_text(api: Api, body: Any) -> None:
    assert survey(api, body).slots == ()


def test_links_may_be_allowed_and_stay_bounded() -> None:
    allowed = Inspection(image_links=True)
    assert survey("chat", asked({"type": "text", "text": f"![a]({REMOTE})"}), allowed).slots == ()
    with pytest.raises(Refused):
        survey("chat", REFUSED["TGI's Markdown with a long description"][1], allowed)


# --- HTTP -------------------------------------------------------------------------------------------------------------

BODY = json.dumps(chat(ORIGINAL)).encode()
JSON = "application/json"
HTTP_ATTEMPTS: dict[str, tuple[bytes, dict[str, str]]] = {
    "gzip": (gzip.compress(BODY), {"content-type": JSON, "content-encoding": "gzip"}),
    "gzip in capitals": (gzip.compress(BODY), {"content-type": JSON, "content-encoding": "GZIP"}),
    "gzip that is not declared": (gzip.compress(BODY), {"content-type": JSON}),
    "identity, then gzip": (gzip.compress(BODY), {"content-type": JSON, "content-encoding": "identity, gzip"}),
    "UTF-16": (BODY.decode().encode("utf-16"), {"content-type": JSON}),
    "UTF-16 without a mark": (BODY.decode().encode("utf-16-le"), {"content-type": JSON}),
    "UTF-32": (BODY.decode().encode("utf-32"), {"content-type": JSON}),
    "another charset": (BODY, {"content-type": "application/json; charset=utf-7"}),
    "two charsets": (BODY, {"content-type": "application/json; charset=utf-7; charset=utf-8"}),
    "a byte order mark": (b"\xef\xbb\xbf" + BODY, {"content-type": JSON}),
    "an overlong slash": (BODY.replace(b"/", b"\xc0\xaf", 1), {"content-type": JSON}),
    "a repeated key": (b'{"messages": [], ' + BODY[1:], {"content-type": JSON}),
    "a repeated key, escaped": (b'{"\\u006dessages": [], ' + BODY[1:], {"content-type": JSON}),
    "two documents": (b"{}\n" + BODY, {"content-type": JSON}),
    "a comment": (b"/* */" + BODY, {"content-type": JSON}),
    "a form": (b"a=" + BODY, {"content-type": "application/x-www-form-urlencoded"}),
    "text": (BODY, {"content-type": "text/plain"}),
    "JSON lines": (BODY, {"content-type": "application/x-ndjson"}),
    "multipart": (b"--x\r\n\r\n" + BODY + b"\r\n--x--\r\n", {"content-type": "multipart/related; boundary=x"}),
}


@pytest.mark.parametrize("name", HTTP_ATTEMPTS)
def test_a_body_that_could_be_read_in_two_ways_is_refused(name: str) -> None:
    content, headers = HTTP_ATTEMPTS[name]

    async def work() -> None:
        upstream = Upstream()
        async with gateway(upstream, allow_uploads=True) as client:
            answer = await client.post(CHAT, content=content, headers=headers)
        assert answer.status_code in (400, 415), answer.text
        assert upstream.requests == []

    run(work())


PATHS = [
    "/v1/chat%2Fcompletions/../../files",
    "/v1/chat/completions%00",
    "/v1/chat/completions;x=1",
    "/v1/chat/completions%3Bx",
    "/v1/chat//completions",
    "/v1/chat/./completions",
    "/v1/%2e%2e/v1/files",
    "/v1/chat/completions%23",
    "/v1/chat/completions%3Fa",
    "/v1/chat\\completions",
    "/v1/Chat/Completions",
]


def test_a_path_with_a_second_reading_reaches_nobody() -> None:
    upstream = Upstream()
    with served(create_app(settings(), purifier=Invert(), transport=upstream.transport)) as base:
        for path in PATHS:
            assert _status(base, path, _length(BODY) + BODY) in (400, 404), path
    assert upstream.requests == []


CHUNKED: dict[str, bytes] = {
    "a sign": b"+1\r\n{\r\n0\r\n\r\n",
    "a prefix": b"0x1\r\n{\r\n0\r\n\r\n",
    "an underscore": b"1_0\r\n{\r\n0\r\n\r\n",
    "a bare line feed": b"1\n{\n0\n\n",
    "a size beyond 64 bits": b"1" + b"0" * 20 + b"\r\n{\r\n0\r\n\r\n",
    "no size": b"\r\n{\r\n0\r\n\r\n",
    "more than the size": b"1\r\n{}\r\n0\r\n\r\n",
}


def test_odd_chunks_are_refused() -> None:
    upstream = Upstream()
    with served(create_app(settings(), purifier=Invert(), transport=upstream.transport)) as base:
        for name, chunks in CHUNKED.items():
            status = _status(base, CHAT, b"transfer-encoding: chunked\r\n\r\n" + chunks)
            assert status in (0, 400), f"{name}: refused, or the connection is closed"
    assert upstream.requests == []


def _length(body: bytes) -> bytes:
    return f"content-length: {len(body)}\r\n\r\n".encode()


def _status(base: str, path: str, rest: bytes) -> int:
    """Send a request as written, without a client that would tidy it up."""
    address = urlsplit(base)
    with socket.create_connection((address.hostname, address.port), 10) as connection:
        head = f"POST {path} HTTP/1.1\r\nhost: gateway.test\r\nconnection: close\r\ncontent-type: {JSON}\r\n"
        connection.sendall(head.encode() + rest)
        connection.shutdown(socket.SHUT_WR)
        answer = connection.recv(65536)
    return int(answer.split()[1]) if answer else 0


def test_headers_that_change_method_path_or_account_do_not_pass() -> None:
    async def work() -> None:
        upstream = Upstream()
        names = ("x-http-method-override", "x-original-url", "x-rewrite-url", "openai-organization", "openai-project")
        async with gateway(upstream, upstream_api_key="the-operators-key") as client:
            await client.post(CHAT, json=chat(ORIGINAL), headers=dict.fromkeys(names, "/v1/files"))
        assert not set(names) & set(upstream.requests[0].headers)

    run(work())
