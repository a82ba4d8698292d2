"""Answers by vote: one request becomes several, each with its images under noise of their own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import httpx2

from codefend.core.votes import elect
from codefend.gateway.engine import Outcome
from codefend.gateway.errors import Api, Refused


def check_votable(outcome: Outcome | None) -> None:
    """Raise Refused (400) for a request whose answer is streamed: a vote needs whole answers."""
    if outcome is not None and outcome.stream:
        raise Refused(400, "stream_refused", "this gateway votes on answers; ask without stream")


def choose(api: Api, responses: Sequence[httpx2.Response]) -> httpx2.Response:
    """The first error, else the majority response (`core.votes.elect`). All are read."""
    failed = [response for response in responses if response.status_code != 200]
    if failed:
        return failed[0]
    return responses[elect([text_of(api, response.content) for response in responses])]


def text_of(api: Api, content: bytes) -> str:
    """The answer's text in a chat completion, a message or a response; "" where there is none, as in tool calls."""
    try:
        body = json.loads(content)
        return "\n".join(_texts(api, body))
    except (ValueError, LookupError, TypeError, AttributeError):
        return ""


def _texts(api: Api, body: Any) -> list[str]:
    if api == "chat":
        return [str(choice["message"]["content"] or "") for choice in body["choices"]]
    if api == "messages":
        return [part["text"] for part in body["content"] if part["type"] == "text"]
    return [part["text"] for item in body["output"] for part in item.get("content", ()) if "text" in part]
