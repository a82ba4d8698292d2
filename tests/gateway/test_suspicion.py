"""What may hide an image: what is refused in a body, what isn't, and what looking for it costs."""

from __future__ import annotations

import base64
import tracemalloc
from typing import Any

import pytest

from codefend.gateway.errors import Api, Refused
from codefend.gateway.shapes import Inspection, survey
from codefend.gateway.suspicion import _STEP


def url(payload: str) -> str:
    return f"data:image/png;base64,{payload}"


IMAGE = {"type": "image_url", "image_url": {"url": url("ORIGINAL")}}
LONG_PNG = "iVBORw0KGgo" + "A" * 600
PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(40)).decode()
# To a server without MP4, a length of 0x220 in its first bytes is the head of a TGA image.
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


def block(kind: str, content: Any = None, **keys: Any) -> tuple[Api, Any]:
    """A conversation with one block of the messages API."""
    beside = {} if content is None else {"content": content}
    return "messages", {"messages": [{"role": "assistant", "content": [{"type": kind, **beside, **keys}]}]}


def fetched(source: Any, **keys: Any) -> tuple[Api, Any]:
    page = {"type": "web_fetch_result", "url": "https://x", "content": {"type": "document", "source": source}, **keys}
    return block("web_fetch_tool_result", page, tool_use_id="1")


def found(*tools: Any) -> tuple[Api, Any]:
    return "responses", {"input": [{"type": "tool_search_output", "call_id": "1", "tools": list(tools)}]}


PLAIN = {"type": "text", "media_type": "text/plain", "data": "a page"}
PDF = {"type": "base64", "media_type": "application/pdf", "data": base64.b64encode(b"%PDF-1.7").decode()}

REFUSED: list[tuple[Api, Any]] = [
    fetched(PDF),
    fetched({"type": "url", "url": "https://x/a.pdf"}),
    fetched({"type": "content", "content": [{"type": "image", "source": {"type": "file", "file_id": "f"}}]}),
    fetched(PLAIN, image="https://x/a.png"),
    fetched(PLAIN, Content={"type": "document", "source": PDF}),
    block("web_fetch_tool_result", {"type": "web_fetch_result", "content": {"type": "image"}}),
    block("web_fetch_tool_result", {"type": "other", "content": {"type": "document", "source": PLAIN}}),
    block("mcp_tool_result", [{"type": "resource", "uri": "https://x/a.png"}], tool_use_id="1"),
    block("mcp_tool_result", "text", tool_use_id="1", image="AAAA"),
    block("bash_code_execution_tool_result", {"type": "bash_code_execution_result", "stdout": LONG_PNG}),
    block("code_execution_tool_result", {"content": [{"type": "code_execution_output", "file_id": "f"}]}),
    block("text_editor_code_execution_tool_result", {"file_type": "image", "content": "AAAA"}),
    block("text_editor_code_execution_tool_result", {"File_Type": "pdf", "content": "AAAA"}),
    block("mcp_tool_listing", tools=[{"name": "f", "description": url("A")}]),
    block("compaction", [{"type": "image"}]),
    block("compaction", "text", tool_changes=[{"type": "tool_addition", "tool": {"type": "web_fetch_20250910"}}]),
    ("chat", chat({"type": "text", "text": "x", "prompt_cache_breakpoint": {"mode": url("A")}})),
    found({"type": "mcp", "server_url": "https://x"}),
    found({"type": "namespace", "name": "n", "tools": [{"type": "web_search"}]}),
    found({"type": "image_generation", "input_image_mask": {"file_id": "f"}}),
    ("responses", {"input": [{"type": "tool_search_output", "Tools": [{"type": "mcp"}]}]}),
    ("responses", {"input": [{"type": "tool_search_call", "arguments": {"a": url("A")}}]}),
    (
        "responses",
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": url("A"), "file_id": "f"}]}]},
    ),
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
    "Image 1: <img>data:image/png;base64,AAAA</img>",
    "<IMG> " + "iVBORw0KGgo" + "A" * 300,
    "<img>" + "iVBORw0KGgoAAAAA\n" * 500 + "</img>",
    "<img>/etc/passwd</img>",
    "<image>a.png</image>",
    "<video>s3://bucket/a.mp4</video>",
]
LINKED = [
    "![](https://evil.test/a.png)",
    "![a cat](http://evil.test/a.png)",
    '<img width=1 src="https://evil.test/a">',
    "Image 1: <img>https://evil.test/x.png</img>",
]


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
                survey(api, body, Inspection(image_links=True))
        else:
            assert survey(api, body, Inspection(image_links=True)).slots == ()


@pytest.mark.parametrize(
    "text",
    [
        "[a link](https://x.org) and ![local](a.png) and <img src='a.png'>",
        "!handlers[kind](data: string)",
        "Markdown writes ![alt](address), HTML <img>, and https://x.org is a page",
        "![alt] (https://x.org)",
        "<img alt='x'> src=https://x.org",
        "an <img> needs no end, and <img></img> is empty",
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


# --- lists of texts, and tools ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        {"input": "https://evil.test/a.png"},
        {"input": ["a cat", " https://evil.test/a.png "]},
        {"input": [{"image": "AAAA"}]},
        {"input": [{"text": "a cat"}]},
        {"input": {"bytes": "AAAA"}},
        {"input": "s3://bucket/a.png"},
        {"input": url("AAAA")},
        {"input": "x", "messages": [{"role": "user", "content": [IMAGE]}]},
        {"input": "x", "ref_images": ["AAAA"]},
        {"query": "x", "documents": [{"image": "https://evil.test/a.png"}]},
        {"query": "x", "documents": ["https://evil.test/a.png"]},
    ],
)
def test_embeddings_and_reranking_take_texts_alone(body: Any) -> None:
    with pytest.raises(Refused) as refusal:
        survey("texts", body)
    assert refusal.value.code == "unknown_content"


def test_texts_that_mention_addresses_pass() -> None:
    for body in ({"input": ["see https://x.org", [1, 2, 3]]}, {"query": "a", "documents": ["b", "c"], "top_n": 1}):
        assert survey("texts", {"model": "m"} | body).slots == ()
    assert survey("texts", {"input": "https://x.org"}, Inspection(image_links=True)).slots == ()


SERVER_TOOLS: list[tuple[Api, dict[str, Any], str]] = [
    ("responses", {"input": "x", "tools": [{"type": "mcp", "server_url": "https://x"}]}, "mcp"),
    ("responses", {"input": "x", "tools": [{"type": "web_search_preview"}]}, "web_search"),
    ("responses", {"input": "x", "tools": [{"type": "code_interpreter"}]}, "code_interpreter"),
    ("messages", {"messages": [], "tools": [{"type": "web_fetch_20250910", "name": "web_fetch"}]}, "web_fetch"),
    ("messages", {"messages": [], "mcp_servers": [{"type": "url", "url": "https://x"}]}, "mcp"),
    ("chat", {"messages": [], "web_search_options": {"search_context_size": "low"}}, "web_search"),
    ("chat", {"messages": [], "plugins": [{"id": "web"}]}, "plugins"),
]


@pytest.mark.parametrize(("api", "body", "name"), SERVER_TOOLS)
def test_tools_that_load_content_on_the_servers_side_need_a_name(api: Api, body: Any, name: str) -> None:
    with pytest.raises(Refused) as refusal:
        survey(api, body)
    assert refusal.value.code == "tool_refused"
    assert survey(api, body, Inspection(tools=(name,))).slots == ()


def test_tools_that_a_search_has_loaded_need_a_name_as_well() -> None:
    api, body = found({"type": "namespace", "name": "n", "tools": [{"type": "web_search"}]}, {"type": "mcp"})
    with pytest.raises(Refused, match="'web_search' loads content") as refusal:
        survey(api, body)
    assert (refusal.value.code, refusal.value.where) == ("tool_refused", "input[0].tools[0].tools[0]")
    assert survey(api, body, Inspection(tools=("mcp", "web_search"))).slots == ()


def test_images_in_results_of_servers_are_found() -> None:
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG}}
    parts = [image, {"type": "text", "text": "x"}]
    for api, body in (block("mcp_tool_result", parts), fetched({"type": "content", "content": parts})):
        (slot,) = survey(api, body).slots
        assert (slot.form, slot.reference) == ("source", PNG)


def test_an_image_may_say_that_it_is_no_file() -> None:
    part = {"type": "input_image", "image_url": url("A"), "file_id": None, "prompt_cache_breakpoint": {}}
    assert len(survey("responses", {"input": [{"role": "user", "content": [part]}]}).slots) == 1


def test_tools_of_the_client_pass() -> None:
    names = ["function", "custom", "computer_use_preview", "local_shell", "bash_20250124", "text_editor_20250728"]
    assert survey("responses", {"input": "x", "tools": [{"type": name} for name in names]}).slots == ()
    assert survey("messages", {"messages": [], "tools": [{"name": "f", "input_schema": {}}]}).slots == ()


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


SCHEMA = {"type": "object", "properties": {"image_url": {"type": "string"}}}

ALLOWED: list[tuple[Api, Any]] = [
    fetched(PLAIN, retrieved_at="2026-12-01"),
    fetched({"type": "content", "content": [{"type": "text", "text": "a page"}]}),
    block("web_fetch_tool_result", {"type": "web_fetch_tool_result_error", "error_code": "url_not_accessible"}),
    block("mcp_tool_use", id="1", name="f", input={"image_url": "x"}, server_name="s"),
    block("mcp_tool_result", [{"type": "text", "text": "x"}], tool_use_id="1", is_error=False),
    block("mcp_tool_result", "text", tool_use_id="1"),
    block("mcp_tool_listing", mcp_server_name="s", tools=[{"name": "f", "description": "d", "input_schema": SCHEMA}]),
    block("code_execution_tool_result", {"type": "code_execution_result", "stdout": "1", "content": []}),
    block("bash_code_execution_tool_result", {"type": "bash_code_execution_result", "stdout": "1", "return_code": 0}),
    block("text_editor_code_execution_tool_result", {"file_type": "text", "content": "x", "num_lines": 1}),
    block(
        "tool_search_tool_result",
        {"type": "tool_search_tool_search_result", "tool_references": [{"type": "tool_reference", "tool_name": "f"}]},
    ),
    block("tool_result", [{"type": "tool_reference", "tool_name": "f"}], tool_use_id="1", toolset_name="t"),
    block("tool_use", id="1", name="f", input={}, toolset_name="t"),
    block("compaction", "a summary", signature="s", tool_changes=None),
    block("compaction", encrypted_content="QkFB" * 200),
    found({"type": "function", "name": "f", "parameters": SCHEMA}, {"type": "namespace", "name": "n", "tools": []}),
    ("responses", {"input": [{"type": "tool_search_call", "arguments": {"query": "x"}, "execution": "server"}]}),
    ("chat", chat({"type": "text", "text": "x", "prompt_cache_breakpoint": {"mode": "explicit", "ttl": "30m"}})),
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
