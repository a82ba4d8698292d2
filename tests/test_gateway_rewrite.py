"""Finding and replacing images: no original survives, nothing else changes, what is not understood is refused."""

from __future__ import annotations

import base64
import copy
import json
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codefend.gateway.errors import Api, Refused, error_body
from codefend.gateway.rewrite import Picture, rebuild, survey
from codefend.gateway.suspicion import _STEP
from codefend.gateway.wire import _no_repeats, api_of, dump, form_of, parse
from codefend.prompts import PromptPolicy

NEW = Picture("image/png", "UFVSRQ==")
PAYLOAD = st.from_regex(r"\AORIGINAL[a-z0-9]{8,40}\Z")
WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30).filter(
    lambda t: "ORIGINAL" not in t
)
DETAIL = st.sampled_from(["low", "high", "auto"])


def url(payload: str) -> str:
    return f"data:image/png;base64,{payload}"


# --- bodies that every API allows ------------------------------------------------------------------------------------

chat_image = st.one_of(
    st.builds(lambda p, d: {"type": "image_url", "image_url": {"url": url(p), "detail": d}}, PAYLOAD, DETAIL),
    st.builds(lambda p: {"type": "image_url", "image_url": url(p)}, PAYLOAD),
)
chat_text = st.builds(lambda t: {"type": "text", "text": t}, WORDS)
chat_content = st.one_of(WORDS, st.none(), st.lists(st.one_of(chat_image, chat_text), max_size=4))
chat_message = st.builds(
    lambda role, content, extra: {"role": role, "content": content, **extra},
    st.sampled_from(["system", "user", "assistant", "tool", "developer"]),
    chat_content,
    st.sampled_from([{}, {"name": "n"}, {"tool_call_id": "c1"}, {"tool_calls": [{"id": "c", "type": "function"}]}]),
)
extras = st.dictionaries(st.sampled_from(["temperature", "seed", "stream", "user"]), st.integers(0, 5), max_size=3)
chat_body = st.builds(lambda m, e: {"model": "m", "messages": m, **e}, st.lists(chat_message, max_size=4), extras)

resp_image = st.builds(lambda p, d: {"type": "input_image", "image_url": url(p), "detail": d}, PAYLOAD, DETAIL)
resp_parts = st.lists(st.one_of(resp_image, st.builds(lambda t: {"type": "input_text", "text": t}, WORDS)), max_size=4)
resp_item = st.one_of(
    st.builds(lambda c: {"role": "user", "content": c}, st.one_of(WORDS, resp_parts)),
    st.builds(lambda c: {"type": "function_call_output", "call_id": "1", "output": c}, st.one_of(WORDS, resp_parts)),
    st.builds(
        lambda p: {"type": "computer_call_output", "output": {"type": "computer_screenshot", "image_url": url(p)}},
        PAYLOAD,
    ),
    st.builds(lambda p: {"type": "image_generation_call", "id": "g", "result": p}, PAYLOAD),
    st.just({"type": "function_call", "name": "f", "arguments": "{}", "call_id": "1"}),
)
resp_body = st.builds(lambda i, e: {"model": "m", "input": i, **e}, st.one_of(WORDS, st.lists(resp_item)), extras)

claude_source = st.one_of(
    st.builds(lambda p: {"type": "base64", "media_type": "image/png", "data": p}, PAYLOAD),
    st.builds(lambda p: {"type": "url", "url": f"https://example.org/{p}"}, PAYLOAD),
)
claude_image = st.builds(lambda s: {"type": "image", "source": s}, claude_source)
claude_text = st.builds(lambda t: {"type": "text", "text": t, "cache_control": {"type": "ephemeral"}}, WORDS)
claude_leaf = st.lists(st.one_of(claude_image, claude_text), max_size=3)
claude_block = st.one_of(
    claude_image,
    claude_text,
    st.builds(lambda c: {"type": "tool_result", "tool_use_id": "t", "content": c}, st.one_of(WORDS, claude_leaf)),
    st.builds(lambda c: {"type": "document", "source": {"type": "content", "content": c}}, claude_leaf),
    st.just({"type": "tool_use", "id": "t", "name": "f", "input": {"image_url": "https://example.org"}}),
)
claude_message = st.builds(
    lambda r, c: {"role": r, "content": c},
    st.sampled_from(["user", "assistant"]),
    st.one_of(WORDS, st.lists(claude_block, max_size=4)),
)
claude_body = st.builds(
    lambda m, e: {"messages": m, "max_tokens": 5, **e}, st.lists(claude_message, max_size=3), extras
)

bodies: st.SearchStrategy[tuple[Api, Any]] = st.one_of(
    st.tuples(st.just("chat"), chat_body),
    st.tuples(st.just("responses"), resp_body),
    st.tuples(st.just("messages"), claude_body),
)


def masked(body: Any, places: list[tuple[str | int, ...]]) -> Any:
    body = copy.deepcopy(body)
    for place in places:
        parent = body
        for step in place[:-1]:
            parent = parent[step]
        parent[place[-1]] = "*"
    return body


@settings(max_examples=300, deadline=None)
@given(bodies)
def test_no_original_survives_and_nothing_else_changes(case: tuple[Api, Any]) -> None:
    api, body = case
    before = copy.deepcopy(body)
    found = survey(api, body)
    rebuilt = rebuild(body, found, [NEW] * len(found.slots))
    assert body == before, "the input must not be changed"
    assert "ORIGINAL" not in json.dumps(rebuilt)
    assert json.dumps(rebuilt).count(NEW.data) == len(found.slots) == json.dumps(before).count("ORIGINAL")
    places = [slot.place for slot in found.slots]
    assert masked(rebuilt, places) == masked(before, places)
    assert survey(api, rebuilt).turns == found.turns


@settings(max_examples=200, deadline=None)
@given(bodies, st.booleans())
def test_policy_touches_users_texts_and_the_system_text_only(case: tuple[Api, Any], everywhere: bool) -> None:
    api, body = case
    found = survey(api, body)
    policy = PromptPolicy("p", system="SYS", prefix="[", suffix="]")
    rebuilt = rebuild(body, found, [NEW] * len(found.slots), policy=policy, everywhere=everywhere)
    text = json.dumps(rebuilt)
    assert "ORIGINAL" not in text
    wrapped = [turn for turn in found.turns if everywhere or turn.has_image]
    assert ("SYS" in text) == bool(wrapped or found.slots)
    survey(api, rebuilt)  # still understood
    if not wrapped and not found.slots:
        assert rebuilt == body


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=20), PAYLOAD.map(url)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["type", "role", "content", "text", "image_url", "source", "input", "messages", "x"]),
            st.one_of(inner, st.sampled_from(["text", "image_url", "image", "user", "message", "input_image"])),
            max_size=4,
        ),
    ),
    max_leaves=20,
)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(["chat", "responses", "messages", "other"]), JSON)
def test_any_json_is_refused_or_leaves_without_its_images(api: Api, content: Any) -> None:
    """Originals may stay only where a model reads plain text."""
    body = {"messages": content, "input": content} if api != "other" else content
    try:
        found = survey(api, body)
    except Refused:
        return
    rebuilt = rebuild(body, found, [NEW] * len(found.slots))
    assert survey(api, rebuilt).slots or not found.slots
    for parent, key, value in leaves(rebuilt):
        if isinstance(value, str) and value.startswith("data:") and "ORIGINAL" in value:
            assert key in ("text", "content", "output", "input"), (parent, key)


def leaves(value: Any, parent: Any = None, key: Any = None) -> list[tuple[Any, Any, Any]]:
    if isinstance(value, dict):
        return [leaf for k, v in value.items() for leaf in leaves(v, value, k)]
    if isinstance(value, list):
        return [leaf for v in value for leaf in leaves(v, parent, key)]
    return [(parent, key, value)]


# --- what must be refused --------------------------------------------------------------------------------------------

IMAGE = {"type": "image_url", "image_url": {"url": url("ORIGINAL")}}
LONG_PNG = "iVBORw0KGgo" + "A" * 600
PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(40)).decode()
# To a server without MP4, a length of 0x220 in its first bytes is the head of a TGA picture.
TGA = base64.b64encode(b"\0\0\x02 ftypM4A \x08\0\x08\0 " + bytes(40)).decode()


def chat(*parts: Any, **extra: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": list(parts)}], **extra}


_HEADS = (
    b"RIFF\x24\0\0\0WAVEfmt ",
    b"ID3\x04",
    b"\xff\xfb\x90\0",
    b"OggS",
    b"fLaC",
    b"\0\0\0 ftypM4A ",
    b"\x1aE\xdf\xa3",
)
SOUNDS = [base64.b64encode(head + bytes(40)).decode() for head in _HEADS]

REFUSED: list[tuple[Api, Any]] = [
    ("chat", chat({"type": "video_url", "video_url": {"url": "https://x"}})),
    ("chat", chat({"type": "file", "file": {"file_id": "f"}})),
    ("chat", chat({"type": "image_embeds", "image_embeds": "AAAA"})),
    ("chat", chat({"image_url": "https://x/a.png"})),
    ("chat", chat("text")),
    ("chat", chat({"type": "text", "text": "hi", "image_url": {"url": url("A")}})),
    ("chat", chat({"type": "text", "text": {"url": url("A")}})),
    ("chat", chat({"type": "text"})),
    ("chat", chat({"type": "image_url", "image_url": {"url": url("A"), "uuid": "1"}})),
    ("chat", chat({"type": "image_url", "image_url": None, "uuid": "1"})),
    ("chat", chat({"type": "image_url", "Image_URL": url("A")})),
    ("chat", {**chat(IMAGE), "Messages": [{"role": "user", "content": [IMAGE]}]}),
    ("chat", {**chat(IMAGE), "meſſages": [{"role": "user", "content": [IMAGE]}]}),
    ("chat", chat(multi_modal_data={"image": "x"})),
    ("chat", chat(extra={"deep": [url("ORIGINAL")]})),
    ("chat", chat(extra={"deep": LONG_PNG})),
    ("chat", chat(extra={"deep": IMAGE})),
    ("chat", chat({"type": "text", "text": "x", "annotations": [url("A")]})),
    ("chat", {"messages": [{"role": "user", "content": "x", "images": ["AAAA"]}]}),
    ("chat", {"messages": [{"role": "user", "content": {"type": "image_url"}}]}),
    ("chat", {"messages": [{"role": "user", "content": "x", "Content": [IMAGE]}]}),
    ("chat", {"messages": {"role": "user"}}),
    ("chat", {"model": "m"}),
    ("chat", []),
    ("responses", {"input": [{"type": "strange"}]}),
    ("responses", {"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}]}),
    ("responses", {"input": [{"role": "user", "content": [{"type": "input_file", "file_data": "x"}]}]}),
    ("responses", {"input": [{"type": "computer_call_output", "output": {"file_id": "f"}}]}),
    ("responses", {"input": [{"type": "code_interpreter_call", "outputs": [{"type": "image", "url": "https://x"}]}]}),
    ("responses", {"input": "x", "prompt": {"id": "p", "variables": {"v": {"type": "input_image"}}}}),
    ("responses", {"input": "x", "tools": [{"type": "image_generation", "input_image_mask": {"file_id": "f"}}]}),
    ("messages", {"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "file"}}]}]}),
    ("messages", {"messages": [{"role": "user", "content": [{"type": "document", "source": {"type": "base64"}}]}]}),
    ("messages", {"messages": [{"role": "user", "content": [{"type": "container_upload", "file_id": "f"}]}]}),
    ("messages", {"system": [{"type": "document", "source": {"type": "url", "url": "https://x"}}], "messages": []}),
    ("other", {"messages": [{"role": "user", "content": [IMAGE]}]}),
    ("other", {"image": "https://x/a.png"}),
    ("other", {"prompt": {"prompt_string": "<__media__>", "multimodal_data": ["UDYK"]}}),
    ("other", {"prompt": [url("ORIGINAL")]}),
    ("other", LONG_PNG),
]


@pytest.mark.parametrize(("api", "body"), REFUSED, ids=lambda v: v if isinstance(v, str) and len(v) < 20 else None)
def test_what_is_not_understood_is_refused(api: Api, body: Any) -> None:
    with pytest.raises(Refused) as refusal:
        survey(api, body)
    assert refusal.value.status == 400
    assert "ORIGINAL" not in refusal.value.message
    assert len(refusal.value.message) < 200


def audio(data: Any, **extra: Any) -> dict[str, Any]:
    return {"type": "input_audio", "input_audio": {"data": data, "format": "wav", **extra}}


@pytest.mark.parametrize(
    "part",
    [
        audio(PNG),
        audio(TGA),
        audio(base64.b64encode(b"RIFF\0\0\0\0WEBPVP8 ").decode()),
        audio("!" + PNG),
        audio(url(PNG)),
        audio(""),
        audio(None),
        audio(SOUNDS[0], url="https://x/a.png"),
        {"type": "input_audio", "input_audio": PNG},
    ],
)
@pytest.mark.parametrize("api", ["chat", "responses"])
def test_audio_that_may_be_an_image_is_refused(api: Api, part: Any) -> None:
    message = {"role": "user", "content": [part]}
    with pytest.raises(Refused) as refusal:
        survey(api, {"messages" if api == "chat" else "input": [message]})
    assert refusal.value.code == "unknown_content"


WRITTEN = [
    "What? ![](data:image/png;base64,AAAA)",
    "![a ![b](DATA:image/png;base64,AAAA)",
    "![a [b](\n <data:image/png;base64,AAAA>)",
    'What? <img src="data:image/png;base64,AAAA" />',
    "<IMG alt='x' SRC = 'data:image/png;asset_id,1'>",
]
LINKED = ["![](https://evil.test/a.png)", "![a cat](http://evil.test/a.png)", '<img width=1 src="https://evil.test/a">']


def holders(text: str) -> list[tuple[Api, Any]]:
    """Bodies with this text wherever a server may read it."""
    user = {"role": "user", "content": text}
    tool = {"type": "function", "function": {"name": "f", "description": text}}
    half = len(text) // 2
    return [
        ("chat", {"messages": [user]}),
        ("chat", {"messages": [{"role": "tool", "tool_call_id": "1", "content": text}]}),
        ("chat", chat({"type": "text", "text": text})),
        ("chat", chat({"type": "text", "text": text[:half]}, {"type": "text", "text": text[half:]})),
        ("chat", {"messages": [], "tools": [tool]}),
        ("chat", {"messages": [], "tools": [{"function": {"parameters": {"properties": {text: {}}}}}]}),
        ("responses", {"input": text}),
        ("responses", {"input": [user], "instructions": text}),
        ("responses", {"input": [{"type": "function_call_output", "call_id": "1", "output": text}]}),
        ("messages", {"messages": [], "system": [{"type": "text", "text": text}]}),
        ("other", {"prompt": text}),
        ("other", {"prompt": [text]}),
        ("other", text),
    ]


@pytest.mark.parametrize("text", WRITTEN + LINKED)
def test_images_written_into_texts_are_refused(text: str) -> None:
    for api, body in holders(text):
        with pytest.raises(Refused) as refusal:
            survey(api, body)
        assert (refusal.value.status, refusal.value.code) == (400, "unknown_content")
        if text in WRITTEN:
            with pytest.raises(Refused):
                survey(api, body, image_links=True)
        else:
            assert survey(api, body, image_links=True).slots == ()


@pytest.mark.parametrize(
    "text",
    [
        "[a link](https://x.org) and ![local](a.png) and <img src='a.png'>",
        "!handlers[kind](data: string)",
        "Markdown writes ![alt](address), HTML <img>, and https://x.org is a page",
        "![alt] (https://x.org)",
        "<img alt='x'> src=https://x.org",
    ],
)
def test_other_texts_with_links_pass(text: str) -> None:
    for api, body in holders(text):
        assert survey(api, body).slots == ()


def test_a_written_image_is_found_wherever_a_long_text_is_cut() -> None:
    image = "![](data:image/png;base64,AAAA)"
    for before in (_STEP - len(image) // 2, _STEP, 3 * _STEP + 7):
        with pytest.raises(Refused, match="Markdown"):
            survey("other", {"prompt": "x" * before + image + "x" * _STEP})


# --- nesting and memory ----------------------------------------------------------------------------------------------


def nested(levels: int, inner: Any) -> Any:
    for _ in range(levels):
        inner = [inner]
    return inner


@pytest.mark.parametrize("api", ["chat", "other"])
def test_too_deep_nesting_is_a_clear_refusal(api: Api) -> None:
    survey(api, {"messages": [], "metadata": nested(98, [])})
    with pytest.raises(Refused, match="nested too deeply: the limit is 100 levels") as refusal:
        survey(api, {"messages": [], "metadata": nested(100, [])})
    assert (refusal.value.status, refusal.value.code) == (400, "invalid_json")


@pytest.mark.parametrize("value", ["", [], {}])
def test_searching_needs_no_memory_of_its_own(value: Any) -> None:
    body = {"messages": [], "metadata": nested(90, [value] * 20_000)}
    tracemalloc.start()
    try:
        survey("chat", body)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 200_000, "no place is kept for each of 20,000 values"


ALLOWED: list[tuple[Api, Any]] = [
    ("chat", chat({"type": "text", "text": "see data:image/png;base64,AAAA"})),
    ("chat", chat({"type": "text", "text": url("AAAA")})),
    *(("chat", chat({"type": "input_audio", "input_audio": {"data": data, "format": "wav"}})) for data in SOUNDS),
    ("chat", chat(tools=[{"type": "function", "function": {"parameters": {"properties": {"image_url": {}}}}}])),
    ("chat", chat(metadata={"image": "kitchen"}, temperature=0.5, stop=["\n"], stream_options={"include_usage": True})),
    ("responses", {"input": None, "previous_response_id": "r"}),
    ("responses", {"input": [{"type": "file_search_call", "results": [{"file_id": "f", "text": "t"}]}]}),
    ("responses", {"input": [{"type": "reasoning", "summary": [{"type": "summary_text", "text": "t"}], "id": "r"}]}),
    ("responses", {"input": [{"type": "reasoning", "summary": [], "encrypted_content": "QkFB" * 200}]}),
    (
        "messages",
        {"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": "x", "signature": "s"}]}]},
    ),
    ("other", {"input": "data: a plural noun", "model": "m"}),
    ("other", {"input": "/9j/ is how JPEG begins. " * 40}),
]


@pytest.mark.parametrize(("api", "body"), ALLOWED)
def test_text_and_tools_pass(api: Api, body: Any) -> None:
    assert survey(api, body).slots == ()


def test_where_names_the_place() -> None:
    with pytest.raises(Refused) as refusal:
        survey("chat", chat({"type": "text", "text": "a"}, {"type": "video_url"}))
    assert refusal.value.where == "messages[0].content[1]"


# --- policies --------------------------------------------------------------------------------------------------------


def test_policy_per_api() -> None:
    policy = PromptPolicy("p", system="SYS", prefix="<", suffix=">")
    body = chat({"type": "text", "text": "a"}, IMAGE, {"type": "text", "text": "b"})
    done = rebuild(body, survey("chat", body), [NEW], policy=policy)
    assert done["messages"][0] == {"role": "system", "content": "SYS"}
    assert [part.get("text") for part in done["messages"][1]["content"]] == ["<a", None, "b>"]

    body = {"messages": [{"role": "developer", "content": "be brief"}, {"role": "user", "content": [IMAGE]}]}
    done = rebuild(body, survey("chat", body), [NEW], policy=policy)
    assert done["messages"][0]["content"] == "SYS\n\nbe brief"
    assert done["messages"][1]["content"][1] == {"type": "text", "text": "<>"}

    body = {"input": "hello", "instructions": "old"}
    done = rebuild(body, survey("responses", body), [], policy=policy, everywhere=True)
    assert done == {"input": "<hello>", "instructions": "SYS\n\nold"}
    assert rebuild(body, survey("responses", body), [], policy=policy) == body

    body = {"system": [{"type": "text", "text": "old"}], "messages": [{"role": "user", "content": "hi"}]}
    done = rebuild(body, survey("messages", body), [], policy=policy, everywhere=True)
    assert [part["text"] for part in done["system"]] == ["SYS", "old"]
    assert done["messages"][0]["content"] == "<hi>"


# --- the wire --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "raw",
    [
        b'{"messages": [], "messages": [1]}',
        b'{"a": {"b": 1, "b": 2}}',
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b"\xef\xbb\xbf{}",
        '{"a": 1}'.encode("utf-16"),
        b"{",
        b"",
        b"\xff",
        b"[" * 100_000,
        b'{"a": ' + b"1" * 5000 + b"}",
    ],
)
def test_json_that_parsers_disagree_about_is_refused(raw: bytes) -> None:
    with pytest.raises(Refused) as refusal:
        parse(raw)
    assert refusal.value.code == "invalid_json"


def test_a_repeated_key_is_found_without_comparing_all_with_all() -> None:
    compared = 0

    class Key(str):
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            nonlocal compared
            compared += 1
            return str.__eq__(self, other)

    names = [f"k{i}" for i in range(2000)]
    with pytest.raises(Refused, match="'last' appears twice"):
        _no_repeats([(Key(name), 1) for name in [*names, "last", "last"]])
    assert compared < 100 * len(names)


def test_numbers_too_large_for_json_are_refused() -> None:
    with pytest.raises(Refused, match="cannot be passed on"):
        dump(parse(b'{"a": 1e999}'))


@given(JSON)
@settings(max_examples=100, deadline=None)
def test_json_comes_back_as_it_went(value: Any) -> None:
    assert parse(dump(value)) == value


def test_routes_and_error_forms() -> None:
    assert api_of("/v1/chat/completions") == "chat"
    assert api_of("/v1/chat/completions/") == "other"
    assert form_of("/v1/messages/batches") == "messages"
    openai = json.loads(error_body("chat", 400, "c", "m", where="messages[0]"))
    assert openai == {"error": {"message": "m", "type": "invalid_request_error", "param": "messages[0]", "code": "c"}}
    claude = json.loads(error_body("messages", 503, "queue_full", "m", request_id="r"))
    assert claude["type"] == "error"
    assert claude["error"] == {"type": "overloaded_error", "message": "queue_full: m"}
