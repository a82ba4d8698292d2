"""One answer, spoken as OpenAI's chat completions, OpenAI's responses or Anthropic's messages, whole or as events."""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from codefend.gateway.errors import Api

Event = tuple[str, dict[str, Any]]  # name ("" for none), data


@dataclass(frozen=True)
class Answer:
    model: str
    text: str
    prompt_tokens: int = 0
    tokens: int = 0
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def pieces(self) -> list[str]:
        return re.findall(r"\s*\S+|\s+$", self.text)


def whole(api: Api, answer: Answer) -> dict[str, Any]:
    """The answer as one JSON object."""
    return {"chat": _chat, "responses": _response, "messages": _message}.get(api, _chat)(answer)


def events(api: Api, answer: Answer, *, usage: bool = False) -> bytes:
    """The answer as server-sent events. ``usage`` adds chat's last chunk with the token counts."""
    make: Callable[[Answer], Iterator[Event]] = {
        "responses": _response_events,
        "messages": _message_events,
    }.get(api, lambda given: _chat_events(given, usage=usage))
    lines = [(f"event: {name}\n" if name else "") + f"data: {json.dumps(data)}\n\n" for name, data in make(answer)]
    return ("".join(lines) + ("data: [DONE]\n\n" if api == "chat" else "")).encode()


# --- chat completions ------------------------------------------------------------------------------------------------


def _chat_usage(answer: Answer) -> dict[str, int]:
    total = answer.prompt_tokens + answer.tokens
    return {"prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.tokens, "total_tokens": total}


def _chat_head(answer: Answer, kind: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{answer.id}", "object": kind, "created": answer.created, "model": answer.model}


def _chat(answer: Answer) -> dict[str, Any]:
    message = {"role": "assistant", "content": answer.text, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    return _chat_head(answer, "chat.completion") | {"choices": [choice], "usage": _chat_usage(answer)}


def _chat_events(answer: Answer, *, usage: bool) -> Iterator[Event]:
    head = _chat_head(answer, "chat.completion.chunk")
    deltas: list[tuple[dict[str, str], str | None]] = [({"role": "assistant", "content": ""}, None)]
    deltas += [({"content": piece}, None) for piece in answer.pieces]
    deltas.append(({}, "stop"))
    for delta, reason in deltas:
        yield "", head | {"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}
    if usage:
        yield "", head | {"choices": [], "usage": _chat_usage(answer)}


# --- responses -------------------------------------------------------------------------------------------------------


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _item(answer: Answer, *, done: bool) -> dict[str, Any]:
    content = [_text_part(answer.text)] if done else []
    status = "completed" if done else "in_progress"
    return {"id": f"msg_{answer.id}", "type": "message", "status": status, "role": "assistant", "content": content}


def _response(answer: Answer, *, done: bool = True) -> dict[str, Any]:
    usage = {
        "input_tokens": answer.prompt_tokens,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": answer.tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": answer.prompt_tokens + answer.tokens,
    }
    return {
        "id": f"resp_{answer.id}",
        "object": "response",
        "created_at": answer.created,
        "status": "completed" if done else "in_progress",
        "model": answer.model,
        "output": [_item(answer, done=True)] if done else [],
        "parallel_tool_calls": False,
        "tool_choice": "none",
        "tools": [],
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "metadata": {},
        "temperature": 0.0,
        "top_p": 1.0,
        "usage": usage if done else None,
    }


def _response_events(answer: Answer) -> Iterator[Event]:
    where = {"item_id": f"msg_{answer.id}", "output_index": 0, "content_index": 0}
    steps: list[tuple[str, dict[str, Any]]] = [
        ("response.created", {"response": _response(answer, done=False)}),
        ("response.in_progress", {"response": _response(answer, done=False)}),
        ("response.output_item.added", {"output_index": 0, "item": _item(answer, done=False)}),
        ("response.content_part.added", where | {"part": _text_part("")}),
        *(("response.output_text.delta", where | {"delta": piece, "logprobs": []}) for piece in answer.pieces),
        ("response.output_text.done", where | {"text": answer.text, "logprobs": []}),
        ("response.content_part.done", where | {"part": _text_part(answer.text)}),
        ("response.output_item.done", {"output_index": 0, "item": _item(answer, done=True)}),
        ("response.completed", {"response": _response(answer)}),
    ]
    for number, (name, data) in enumerate(steps):
        yield name, {"type": name, "sequence_number": number} | data


# --- Anthropic messages ----------------------------------------------------------------------------------------------


def _message(answer: Answer) -> dict[str, Any]:
    return {
        "id": f"msg_{answer.id}",
        "type": "message",
        "role": "assistant",
        "model": answer.model,
        "content": [{"type": "text", "text": answer.text}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {"input_tokens": answer.prompt_tokens, "output_tokens": answer.tokens},
    }


def _message_events(answer: Answer) -> Iterator[Event]:
    start = _message(answer) | {"content": [], "stop_reason": None}
    steps: list[tuple[str, dict[str, Any]]] = [
        ("message_start", {"message": start}),
        ("content_block_start", {"index": 0, "content_block": {"type": "text", "text": ""}}),
        *(("content_block_delta", {"index": 0, "delta": {"type": "text_delta", "text": p}}) for p in answer.pieces),
        ("content_block_stop", {"index": 0}),
        (
            "message_delta",
            {
                "delta": {"stop_reason": "end_turn", "stop_sequence": None},
                "usage": {"output_tokens": answer.tokens},
            },
        ),
        ("message_stop", {}),
    ]
    for name, data in steps:
        yield name, {"type": name} | data
