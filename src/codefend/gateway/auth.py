"""Bearer keys for every route but health and the static page, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from codefend.gateway.errors import error_body
from codefend.gateway.wire import form_of

OPEN = frozenset({"/healthz", "/readyz", "/"})  # the page holds no data; what it asks for needs the key
KEY_HEADER = b"x-codefend-key"


class Auth:
    """Pure ASGI. A request that passes has ``scope["codefend.key"]``: a short digest that names its key.

    ``scope["codefend.key_header"]`` names the header that held the key, so that it is not passed on.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self.app = app
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or not self._digests or scope.get("path") in OPEN:
            await self.app(scope, receive, send)
            return
        found = self._match(scope)
        if found is None:
            await _unauthorized(scope, send)
            return
        scope["codefend.key"], scope["codefend.key_header"] = found
        await self.app(scope, receive, send)

    def _match(self, scope: Scope) -> tuple[str, bytes] | None:
        found = None
        for name, value in scope["headers"]:
            if name not in (KEY_HEADER, b"authorization", b"x-api-key"):
                continue
            key = value[7:].strip() if name == b"authorization" and value[:7].lower() == b"bearer " else value
            digest = hashlib.sha256(key).digest()
            matches = [hmac.compare_digest(digest, known) for known in self._digests]  # all of them, always
            if any(matches):
                found = digest.hex()[:8], name
        return found


async def _unauthorized(scope: Scope, send: Send) -> None:
    if scope["type"] != "http":
        await send({"type": "websocket.close", "code": 4401})
        return
    api = form_of(scope["path"])
    body = error_body(api, 401, "invalid_api_key", "this gateway needs a key: Authorization: Bearer ...")
    headers = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer")]
    headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": 401, "headers": headers})
    await send({"type": "http.response.body", "body": body})
