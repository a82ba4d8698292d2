"""Refusals, and how each API words an error."""

from __future__ import annotations

import json
import math
from typing import Any, Literal

Api = Literal["chat", "responses", "messages", "texts", "image", "other"]


class Refused(Exception):
    """A request that is answered with an error and never reaches the upstream.

    ``code`` is a stable word for programs, ``message`` one line for people, ``where`` the place in the request.
    ``retry_after`` (seconds) becomes the header of that name.
    """

    def __init__(
        self, status: int, code: str, message: str, *, where: str = "", retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message
        self.where, self.retry_after = where, retry_after

    def body(self, api: Api, request_id: str = "") -> bytes:
        """The error as the API's own clients expect it."""
        return error_body(api, self.status, self.code, self.message, where=self.where, request_id=request_id)

    def at(self, where: str) -> Refused:
        """The same refusal of this place in the request."""
        return Refused(self.status, self.code, self.message, where=where, retry_after=self.retry_after)

    @property
    def retry_seconds(self) -> int | None:
        """The value of ``Retry-After``."""
        return None if self.retry_after is None else max(1, math.ceil(self.retry_after))

    def __reduce__(self) -> Any:  # worker processes send it
        return _refused, (self.status, self.code, self.message, self.where, self.retry_after)


def _refused(status: int, code: str, message: str, where: str, retry_after: float | None) -> Refused:
    return Refused(status, code, message, where=where, retry_after=retry_after)


_OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_ANTHROPIC_TYPES = _OPENAI_TYPES | {413: "request_too_large", 503: "overloaded_error", 504: "timeout_error"}


def error_body(api: Api, status: int, code: str, message: str, *, where: str = "", request_id: str = "") -> bytes:
    """Word an error as the API's own clients expect it: Anthropic's form for ``messages``, OpenAI's for the rest."""
    fallback = "invalid_request_error" if status < 500 else "api_error"
    body: dict[str, Any]
    if api == "messages":
        place = f" (at {where})" if where else ""
        error = {"type": _ANTHROPIC_TYPES.get(status, fallback), "message": f"{code}: {message}{place}"}
        body = {"type": "error", "error": error, "request_id": request_id or None}
    else:
        kind = _OPENAI_TYPES.get(status, fallback)
        body = {"error": {"message": message, "type": kind, "param": where or None, "code": code}}
    return json.dumps(body).encode()
