"""Finding and replacing images: no original survives, nothing else changes; and the JSON that they come in."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codefend.gateway.errors import Api, Refused, error_body
from codefend.gateway.rewrite import EncodedImage, rebuild
from codefend.gateway.routes import api_of, error_api_of
from codefend.gateway.shapes import survey
from codefend.gateway.wire import _no_repeats, dump, parse
from codefend.prompts import PromptPolicy

NEW = EncodedImage("image/png", "UFVSRQ==")
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
    slots = survey(api, body)
    rebuilt = rebuild(body, slots, [NEW] * len(slots.slots))
    assert body == before, "the input must not be changed"
    assert "ORIGINAL" not in json.dumps(rebuilt)
    assert json.dumps(rebuilt).count(NEW.data) == len(slots.slots) == json.dumps(before).count("ORIGINAL")
    places = [slot.place for slot in slots.slots]
    assert masked(rebuilt, places) == masked(before, places)
    assert survey(api, rebuilt).turns == slots.turns


@settings(max_examples=200, deadline=None)
@given(bodies, st.booleans())
def test_policy_touches_users_texts_and_the_system_text_only(case: tuple[Api, Any], everywhere: bool) -> None:
    api, body = case
    slots = survey(api, body)
    policy = PromptPolicy("p", system="SYS", prefix="[", suffix="]")
    rebuilt = rebuild(body, slots, [NEW] * len(slots.slots), policy=policy, everywhere=everywhere)
    text = json.dumps(rebuilt)
    assert "ORIGINAL" not in text
    wrapped = [turn for turn in slots.turns if everywhere or turn.has_image]
    assert ("SYS" in text) == bool(wrapped or slots.slots)
    survey(api, rebuilt)  # still understood
    if not wrapped and not slots.slots:
        assert rebuilt == body


APIS: st.SearchStrategy[Api] = st.sampled_from(["chat", "responses", "messages", "texts", "other"])
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
@given(APIS, JSON)
def test_any_json_is_refused_or_leaves_without_its_images(api: Api, content: Any) -> None:
    """Originals may stay only where a model reads plain text."""
    body = {"messages": content, "input": content} if api not in ("other", "texts") else content
    try:
        slots = survey(api, body)
    except Refused:
        return
    rebuilt = rebuild(body, slots, [NEW] * len(slots.slots))
    assert survey(api, rebuilt).slots or not slots.slots
    for parent, key, value in leaves(rebuilt):
        if isinstance(value, str) and value.startswith("data:") and "ORIGINAL" in value:
            assert key in ("text", "content", "output", "input"), (parent, key)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("test", "strategies"),
    [
        (test_no_original_survives_and_nothing_else_changes, (bodies,)),
        (test_any_json_is_refused_or_leaves_without_its_images, (APIS, JSON)),
    ],
)
def test_ten_thousand_bodies(test: Any, strategies: tuple[Any, ...]) -> None:
    settings(max_examples=10_000, deadline=None)(given(*strategies)(test.hypothesis.inner_test))()


def leaves(value: Any, parent: Any = None, key: Any = None) -> list[tuple[Any, Any, Any]]:
    if isinstance(value, dict):
        return [leaf for k, v in value.items() for leaf in leaves(v, value, k)]
    if isinstance(value, list):
        return [leaf for v in value for leaf in leaves(v, parent, key)]
    return [(parent, key, value)]


# --- policies --------------------------------------------------------------------------------------------------------


def test_policy_per_api() -> None:
    policy = PromptPolicy("p", system="SYS", prefix="<", suffix=">")
    image = {"type": "image_url", "image_url": {"url": url("ORIGINAL")}}
    parts = [{"type": "text", "text": "a"}, image, {"type": "text", "text": "b"}]
    body: dict[str, Any] = {"messages": [{"role": "user", "content": parts}]}
    done = rebuild(body, survey("chat", body), [NEW], policy=policy)
    assert done["messages"][0] == {"role": "system", "content": "SYS"}
    assert [part.get("text") for part in done["messages"][1]["content"]] == ["<a", None, "b>"]

    body = {"messages": [{"role": "developer", "content": "be brief"}, {"role": "user", "content": [image]}]}
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
    assert error_api_of("/v1/messages/batches") == "messages"
    openai = json.loads(error_body("chat", 400, "c", "m", where="messages[0]"))
    assert openai == {"error": {"message": "m", "type": "invalid_request_error", "param": "messages[0]", "code": "c"}}
    claude = json.loads(error_body("messages", 503, "queue_full", "m", request_id="r"))
    assert claude["type"] == "error"
    assert claude["error"] == {"type": "overloaded_error", "message": "queue_full: m"}
