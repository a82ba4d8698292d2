"""Routes and strict JSON: a body that two parsers could read differently is refused, never passed on."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from codefend.gateway.errors import Api, Refused

ROUTES: dict[str, Api] = {
    "/v1/chat/completions": "chat",
    "/v1/responses": "responses",
    "/v1/responses/input_tokens": "responses",
    "/v1/messages": "messages",
    "/v1/messages/count_tokens": "messages",
}


def api_of(path: str) -> Api:
    """Name the request shape of a route; ``other`` bodies are searched for images but not rewritten."""
    return ROUTES.get(path, "other")


def form_of(path: str) -> Api:
    """Name the API whose error form a route's clients expect."""
    return "messages" if path.startswith("/v1/messages") else api_of(path)


def parse(raw: bytes) -> Any:
    """Read JSON as UTF-8. Raises Refused (400) for what parsers disagree about: repeated keys, NaN, a byte order mark.

    Upstreams written in other languages may take the first of two equal keys where Python takes the last.
    """
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_no_repeats, parse_constant=_no_constants)
    except UnicodeDecodeError as error:
        raise Refused(400, "invalid_json", "the body is not UTF-8") from error
    except RecursionError as error:
        raise Refused(400, "invalid_json", "the body is nested too deeply") from error
    except ValueError as error:
        raise Refused(400, "invalid_json", f"the body is not valid JSON: {str(error)[:120]}") from error


def dump(body: Any) -> bytes:
    """Write JSON without spaces. Raises Refused (400) for numbers that JSON cannot hold."""
    try:
        return json.dumps(body, separators=(",", ":"), allow_nan=False).encode("ascii")
    except (ValueError, RecursionError) as error:
        raise Refused(400, "invalid_json", f"the body cannot be passed on: {str(error)[:120]}") from error


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        ((repeated, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise Refused(400, "invalid_json", f"the key {repeated[:60]!r} appears twice in one object")
    return found


def _no_constants(text: str) -> Any:
    raise Refused(400, "invalid_json", f"{text} is not a JSON number")
