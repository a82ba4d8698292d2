"""The images of MCP messages, wherever they stand and however they are written."""

from __future__ import annotations

import base64
import contextlib
import json
import time
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codefend.core import images
from codefend.gateway.errors import Refused
from codefend.gateway.options import Limits
from codefend.gateway.rewrite import EncodedImage
from codefend.integrations.mcp.messages import EMPTY_URL, read, write
from gateway_kit import b64, image, png, url

A, B = png(1), png(2)
JPEG = images.encode(image(3), "JPEG")
NEW = EncodedImage("image/png", b64(b"purified"))
SVG = "<svg xmlns='http://www.w3.org/2000/svg'/>"


def passed(message: Any, **options: Any) -> Any:
    """The message with NEW in place of every image of pixels."""
    reading = read(json.dumps(message).encode(), Limits(), **options)
    done = write(reading, [NEW if span.data and span.data[0] > 127 else None for span in reading.spans])
    assert done.endswith(b"\n")
    assert done.count(b"\n") == 1
    return json.loads(done)


def wrapped(content: Any) -> Any:
    return {"jsonrpc": "2.0", "id": 1, "result": content}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (
            {"content": [{"type": "image", "data": b64(JPEG), "mimeType": "image/jpeg"}]},
            {"content": [{"type": "image", "data": NEW.data, "mimeType": "image/png"}]},
        ),
        (
            {"contents": [{"uri": "a://b", "mimeType": "application/zip", "blob": b64(A)}]},
            {"contents": [{"uri": "a://b", "mimeType": "application/zip", "blob": NEW.data}]},
        ),
        (
            {"content": [{"type": "resource", "resource": {"uri": "a://b", "blob": b64(A)}}]},
            {"content": [{"type": "resource", "resource": {"uri": "a://b", "blob": NEW.data}}]},
        ),
        ({"structuredContent": {"a": [{"b": b64(JPEG)}]}}, {"structuredContent": {"a": [{"b": NEW.data}]}}),
        ({"text": f"![a]({url(A)}) b"}, {"text": f"![a](data:image/png;base64,{NEW.data}) b"}),
        ({"text": json.dumps({"a": b64(A)})}, {"text": json.dumps({"a": NEW.data})}),
        ({"text": json.dumps(b64(JPEG)).replace("/", "\\/")}, {"text": json.dumps(NEW.data)}),
        ({"text": f"two: {b64(A)}, {b64(B)}."}, {"text": f"two: {NEW.data}, {NEW.data}."}),
        ({"text": base64.encodebytes(A).decode()}, {"text": NEW.data + "\n"}),
        ({"a": base64.urlsafe_b64encode(JPEG).decode().rstrip("=")}, {"a": NEW.data}),
        ({"a": "DATA:;base64," + quote(b64(A))}, {"a": f"data:image/png;base64,{NEW.data}"}),
        ({"a": f"data:text/plain,{b64(A)}"}, {"a": f"data:text/plain,{NEW.data}"}),
        ({"icons": [{"src": f"data:image/svg+xml;base64,{b64(SVG.encode())}"}]}, {"icons": [{"src": EMPTY_URL}]}),
        ({"icons": [{"src": "data:image/svg+xml,%3Csvg%3E"}]}, {"icons": [{"src": EMPTY_URL}]}),
        ({"text": "a data:image/png;base64,%%% b"}, {"text": f"a {EMPTY_URL} b"}),
    ],
)
def test_images_are_replaced_wherever_they_stand(before: Any, after: Any) -> None:
    assert passed(wrapped(before)) == wrapped(after)


@pytest.mark.parametrize(
    "content",
    [
        {"text": "iVBORw0KGgo is how PNG begins, /9j/ JPEG; data:image is a scheme, data:, is empty"},
        {"text": "![a](https://example.org/a.png) <img src='b.png'>"},
        {"content": [{"type": "resource_link", "uri": "https://example.org/a.png", "mimeType": "image/png"}]},
        {"content": [{"type": "audio", "data": b64(b"RIFF....WAVEfmt " * 9), "mimeType": "audio/wav"}]},
        {"contents": [{"uri": "a://b", "blob": b64(b"PK\3\4" * 99)}]},
        {"structuredContent": {"type": "image", "width": 3, "file": "a.png", "tokens": "UklGR" + "A" * 99}},
        {"text": f"data:font/woff2;base64,{b64(b'wOF2' * 40)}", "n": [1e22, 10**30, -0.0, None, True]},
    ],
)
def test_nothing_else_is_taken_for_an_image(content: Any) -> None:
    assert read(json.dumps(wrapped(content)).encode(), Limits()).spans == ()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"content": [{"type": "image", "data": "https://example.org/a.png"}]}, "not valid base64"),
        ({"contents": [{"blob": b64(b"%PDF-1.7 ...")}]}, "PDF"),
        ({"contents": [{"blob": b64(b"?" * 90), "mimeType": "application/pdf"}]}, "PDF"),
        ({"contents": [{"uri": "a://b", "blob": "!" * 999 + b64(A)}]}, "not valid base64"),
        ({"contents": [{"text": SVG, "mimeType": "image/svg+xml"}]}, "cannot be purified"),
        ({"a": [b64(A)] * 21}, "21 images"),
    ],
)
def test_what_cannot_be_purified_is_refused(content: Any, words: str) -> None:
    with pytest.raises(Refused, match=words):
        passed(wrapped(content))


def test_pdfs_pass_where_the_operator_says_so() -> None:
    content = wrapped({"contents": [{"blob": b64(b"%PDF-1.7 ...")}]})
    assert passed(content, documents="pass") == content


@pytest.mark.parametrize(
    "raw", [b'{"a":1,"a":2}', b'{"a":NaN}', b"\xff", b"[" * 5000, b"log line", b"200", b"null", b'"text"']
)
def test_what_parsers_read_differently_is_refused(raw: bytes) -> None:
    with pytest.raises(Refused):
        read(raw, Limits())


FORMS = st.sampled_from(
    [
        b64,
        url,
        lambda data: json.dumps({"at": b64(data)}),
        lambda data: f"text {url(data)} text",
        lambda data: base64.urlsafe_b64encode(data).decode(),
        lambda data: json.dumps(url(data)).replace("/", "\\/"),
    ]
)
IMAGES = st.builds(lambda form, seed: form(png(seed) if seed % 2 else JPEG), FORMS, st.integers(0, 3))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text() | IMAGES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60)
@given(VALUES)
def test_no_original_survives_at_any_place_of_any_message(value: Any) -> None:
    done = json.dumps(passed(wrapped({"content": value})))
    for start in (b64(A)[:24], b64(B)[:24], b64(JPEG)[8:24]):
        assert start not in done.replace("\\", "").replace("_", "/").replace("-", "+")


@pytest.mark.parametrize("text", ["data:" * 400_000, "/9j/" * 500_000, "iVBORw0KGgo " * 160_000, "A/" * 1_000_000])
def test_hostile_texts_are_read_in_linear_time(text: str) -> None:
    raw, start = json.dumps({"text": text}).encode(), time.process_time()
    with contextlib.suppress(Refused):
        read(raw, Limits())
    assert time.process_time() - start < 3
