"""Long strings are cut out before parsing: the outcome is the same as if they were not, only sooner."""

from __future__ import annotations

import asyncio
import base64
import json
import random
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st

from codefend.gateway import engine
from codefend.gateway.engine import Engine
from codefend.gateway.errors import Refused
from codefend.gateway.excise import KEPT, LONG, excise, marks, restored
from codefend.gateway.limits import Limits, payload
from codefend.gateway.worker import Worker
from gateway_kit import CHAT, Invert, Upstream, b64, chat, gateway, png, run, url

LARGE = png(5, height=200, width=200)  # noise: about 100 kB
ENGINE = Engine(Worker(Invert()))
LONG_STRING = "Ab1+/" * (LONG // 4)


def test_images_are_decoded_from_where_they_lay() -> None:
    raw = json.dumps(chat(png(1), LARGE, png(2), LARGE)).encode()
    reading = ENGINE._read("chat", raw)
    assert len(reading.cuts) == 2
    assert [payload(slot.reference, Limits(), cuts=reading.cuts) for slot in reading.survey.slots] == [
        png(1),
        LARGE,
        png(2),
        LARGE,
    ]
    assert all(len(slot.reference) < 3 * KEPT for slot in reading.survey.slots if marks(slot.reference))


STRINGS = st.sampled_from([LONG_STRING, f'{LONG_STRING}"', f"{LONG_STRING}\\", f"é{LONG_STRING}", "short", 'a"b\\'])
VALUES = st.recursive(
    STRINGS | st.integers() | st.just([7] * LONG) | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(STRINGS, inner, max_size=2),
    max_leaves=5,
)


@budget(max_examples=60, deadline=None)
@given(VALUES, st.booleans())
def test_any_json_reads_as_it_does_whole(value: Any, ascii_only: bool) -> None:
    raw = json.dumps(value, ensure_ascii=ascii_only).encode()
    assert ENGINE._read("other", raw).body == value
    excised = excise(raw)
    spelled = excised.raw.decode("latin-1")
    if spelled.isascii():
        assert b"".join(map(bytes, restored(spelled, excised.cuts))) == raw


@budget(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([b'"', b"\\", b"\n", b"\0", b"\xff", b"~", b"[", b'","', b'":"']))
def test_a_damaged_body_is_refused_or_reads_as_it_does_whole(seed: int, damage: bytes) -> None:
    raw = json.dumps(chat(LARGE), separators=(",", ":")).encode()
    place = random.Random(seed).randrange(len(raw))
    broken = raw[:place] + damage + raw[place + 1 :]

    def images(read: Any) -> list[bytes] | None:
        try:
            reading = read()
            return [payload(slot.reference, Limits(), cuts=reading.cuts) for slot in reading.survey.slots]
        except Refused:
            return None

    def whole() -> Any:
        from codefend.gateway.engine import Reading
        from codefend.gateway.wire import parse

        body = parse(broken)
        return Reading(body, ENGINE._survey("chat", body))

    excised, expected = images(lambda: ENGINE._read("chat", broken)), images(whole)
    # A raw line break inside base64 is skipped like an escaped one: the image is encoded anew in any case.
    assert excised == expected or (damage == b"\n" and expected is None and excised is not None)


def test_a_mark_of_the_clients_own_means_nothing() -> None:
    mark = f"~{'0' * 32}.0~"
    body = chat(text=mark + "x" * 2000) | {"user": mark}
    assert ENGINE._read("chat", json.dumps(body).encode()).body == body


def test_an_image_hidden_in_a_long_string_is_still_found() -> None:
    for hidden in (url(LARGE), b64(LARGE)):
        with pytest.raises(Refused, match="image where none"):
            ENGINE._read("chat", json.dumps(chat(png(1)) | {"user": hidden}).encode())


def test_padding_belongs_at_the_end() -> None:
    data = base64.b64encode(b"x" * 100).decode()
    assert payload(data, Limits()) == b"x" * 100
    for bad in (data + data, data[:40] + "=" + data[41:], "=" + data, data + "=", data[:-1]):
        with pytest.raises(Refused):
            payload(bad, Limits())


def test_a_body_of_millions_of_values_is_refused() -> None:
    raw = b'{"input":[' + b"1," * 1_000_001 + b"1]}"
    with pytest.raises(Refused) as refusal:
        ENGINE._read("other", raw)
    assert refusal.value.code == "body_too_complex"


def test_a_long_text_beside_images_is_put_back_and_read_and_the_images_stay_cut_out() -> None:
    words = "all work and no play " * 5000
    body = chat(LARGE, text=words) | {"user": words}
    reading = ENGINE._read("chat", json.dumps(body).encode())
    assert len(reading.cuts) == 1
    assert reading.body["user"] == reading.body["messages"][0]["content"][0]["text"] == words
    assert [payload(slot.reference, Limits(), cuts=reading.cuts) for slot in reading.survey.slots] == [LARGE]


def test_a_body_of_much_that_is_no_image_is_refused() -> None:
    for raw in (
        b'{"messages":[],"user":"' + b"x" * (17 << 20) + b'"}',
        b'{"messages":[],"user":[' + b'"x",' * (5 << 20),
    ):
        with pytest.raises(Refused) as refusal:
            ENGINE._read("chat", raw)
        assert refusal.value.code == "body_too_complex"


@pytest.mark.parametrize("rest", [b"[]," * (6 << 20), b"1," * 1_000_001])
def test_an_image_beside_it_does_not_let_such_a_body_be_parsed(rest: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = json.dumps(chat(LARGE)).encode()[:-1] + b',"metadata":[' + rest + b"0]}"
    parsed: list[int] = []

    def counting(given: bytes) -> Any:
        parsed.append(len(given))
        return {}

    monkeypatch.setattr(engine, "parse", counting)
    with pytest.raises(Refused) as refusal:
        ENGINE._read("chat", raw)
    assert refusal.value.code == "body_too_complex"
    assert parsed == []


def test_a_large_image_does_not_stop_the_event_loop() -> None:
    """Timed in CPU seconds of this thread, so that a busy machine cannot fail it."""
    noise = base64.b64encode(random.Random(1).randbytes(15 << 20)).decode()
    body = json.dumps(chat() | {"messages": [{"role": "user", "content": [_part(noise)]}]}).encode()
    longest = 0.0

    async def watch() -> None:
        nonlocal longest
        while True:
            start = time.thread_time()
            await asyncio.sleep(0)
            longest = max(longest, time.thread_time() - start)

    async def work() -> None:
        async with gateway(Upstream()) as client:
            watching = asyncio.create_task(watch())
            answer = await client.post(CHAT, content=body, headers={"content-type": "application/json"})
            watching.cancel()
        assert answer.json()["error"]["code"] == "invalid_image"

    run(work())
    assert longest < 0.05


def _part(noise: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{noise}"}}
