"""Which API routes are served, and which request shape each of them has. Everything else is refused.

A provider's API has routes that no user of a gateway should reach with the operator's key: administration, billing,
fine-tuning, other users' files. So a route must be named to be served.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches

from codefend.gateway.errors import Api, Refused

_ID = r"[^/]+"
_PARTS = "POST /v1/uploads/{id}/parts"
GROUPS: dict[str, tuple[str, ...]] = {  # "METHODS path"; {id} is one segment, * any rest
    "chat": ("POST /v1/chat/completions",),
    "responses": (
        "POST /v1/responses",
        "POST /v1/responses/input_tokens",
        "POST /v1/responses/compact",
        "GET,DELETE /v1/responses/{id}",
        "GET /v1/responses/{id}/input_items",
        "POST /v1/responses/{id}/cancel",
    ),
    "messages": ("POST /v1/messages", "POST /v1/messages/count_tokens"),
    "completions": ("POST /v1/completions",),
    "embeddings": ("POST /v1/embeddings",),
    "models": ("GET /v1/models", "GET /v1/models/*"),
    "rerank": ("POST /v1/rerank", "POST /v1/score"),
    "moderations": ("POST /v1/moderations",),
    "tokenize": ("POST /v1/tokenize", "POST /v1/detokenize"),
    "speech": ("POST /v1/audio/speech",),
    "transcription": ("POST /v1/audio/transcriptions", "POST /v1/audio/translations"),
    "images": ("POST /v1/images/generations",),
    "uploads": (
        "GET,POST /v1/files",
        "GET,DELETE /v1/files/{id}",
        "GET /v1/files/{id}/content",
        "GET,POST /v1/batches",
        "GET /v1/batches/{id}",
        "POST /v1/batches/{id}/cancel",
        "POST /v1/uploads",
        _PARTS,
        "POST /v1/uploads/{id}/complete",
        "POST /v1/uploads/{id}/cancel",
        "GET,POST /v1/messages/batches",
        "GET,DELETE /v1/messages/batches/{id}",
        "GET /v1/messages/batches/{id}/results",
        "POST /v1/messages/batches/{id}/cancel",
    ),
}
DEFAULT_ROUTES = ("chat", "responses", "messages", "completions", "embeddings", "models")
UPLOADS = "uploads"  # served with allow_uploads, without being named

_SHAPES: dict[str, Api] = {
    "/v1/chat/completions": "chat",
    "/v1/responses": "responses",
    "/v1/responses/input_tokens": "responses",
    "/v1/responses/compact": "responses",
    "/v1/messages": "messages",
    "/v1/messages/count_tokens": "messages",
    "/v1/embeddings": "texts",
    "/v1/rerank": "texts",
    "/v1/score": "texts",
}


def api_of(path: str) -> Api:
    """Name the request shape of a route; bodies of ``other`` routes are searched for images but not rewritten."""
    return _SHAPES.get(path, "other")


def api_by_suffix(path: str) -> Api:
    """Name the request shape of a path under any prefix, as in ``/openai/deployments/x/chat/completions``."""
    path = path.rstrip("/")
    known = (api for route, api in _SHAPES.items() if api != "texts" and path.endswith(route.removeprefix("/v1")))
    return next(known, "other")


def error_api_of(path: str) -> Api:
    """Name the API whose error form a route's clients expect."""
    return "messages" if path.startswith("/v1/messages") else api_of(path)


def is_part(method: str, path: str) -> bool:
    """Whether the route takes a part of an upload: bytes that cannot be inspected one by one."""
    return _matches([_rule(_PARTS)], method, path)


def route_label(path: str) -> str:
    """The route for metrics: a known one, or one label for all others."""
    return path if path in _SHAPES else "/v1/*"


class Routes:
    """The routes that are served: names of `GROUPS`, and paths like ``/v1/x/*`` or ``POST /v1/x``.

    Raises ValueError for an unknown name.
    """

    def __init__(self, names: Sequence[str] = DEFAULT_ROUTES, *, uploads: bool = False) -> None:
        self._rules: list[tuple[frozenset[str], re.Pattern[str]]] = []
        self._uploads: list[tuple[frozenset[str], re.Pattern[str]]] = [_rule(text) for text in GROUPS[UPLOADS]]
        for name in (*names, UPLOADS) if uploads else names:
            for text in GROUPS.get(name, (name,)):
                if "/" not in text:
                    near = get_close_matches(name, GROUPS, n=1, cutoff=0.5)
                    hint = f"did you mean {near[0]!r}?" if near else f"choose {', '.join(GROUPS)} or a path"
                    raise ValueError(f"unknown route {name!r}; {hint}")
                self._rules.append(_rule(text))

    def check(self, method: str, path: str, *, key: Routes | None = None) -> None:
        """Raise Refused (403, 404) for a route that is not served here, or not to a key with routes of its own."""
        if _matches(self._rules, method, path):
            if key is not None and not _matches(key._rules, method, path):
                raise Refused(403, "route_refused", f"this key may not use {method} {path[:100]}")
            return
        if self.is_upload(method, path):
            message = "files and batches cannot be inspected and are not passed on here (--allow-uploads)"
            raise Refused(403, "uploads_refused", message)
        raise Refused(
            404, "unknown_route", f"{method} {path[:100]} is not served here; its operator chooses them by --routes"
        )

    def is_upload(self, method: str, path: str) -> bool:
        """Whether the route is one of files and batches."""
        return _matches(self._uploads, method, path)


def _rule(text: str) -> tuple[frozenset[str], re.Pattern[str]]:
    methods, _, path = text.rpartition(" ")
    pattern = re.escape(path).replace(r"\{id\}", _ID)
    if pattern.endswith(r"\*"):
        pattern = pattern.removesuffix(r"\*") + ".+"
    return frozenset(methods.split(",")) if methods else frozenset(), re.compile(f"{pattern}\\Z")


def _matches(rules: Sequence[tuple[frozenset[str], re.Pattern[str]]], method: str, path: str) -> bool:
    method = "GET" if method == "HEAD" else method
    return any((not methods or method in methods) and pattern.match(path) for methods, pattern in rules)


_PLAIN_SEGMENT = re.compile(r"[\w.:@~+=,!$&'()* -]+\Z")  # no %, no ;, no backslash: nothing that is decoded again


def check_path(path: str) -> None:
    """Raise Refused (400) for a path that an upstream could resolve to another route than the one checked here."""
    segments = path.split("/")[1:]
    if (
        not path.startswith("/")
        or not path.isprintable()
        or any(segment in ("", ".", "..") or not _PLAIN_SEGMENT.match(segment) for segment in segments)
    ):
        raise Refused(400, "invalid_path", "the path is not in its plain form")
