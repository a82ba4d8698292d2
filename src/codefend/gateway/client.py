"""``wrap(OpenAI(...))``: the same client, whose images are purified before they leave this process.

Works on the HTTP layer that the official OpenAI and Anthropic clients share, so every method, stream and retry of
theirs goes through it. A refusal comes back as the client's own ``BadRequestError``. WebSockets do not go through it:
``responses.connect`` and ``realtime.connect`` of the copy raise TypeError.
"""

from __future__ import annotations

import asyncio
from importlib import import_module
from types import ModuleType
from typing import Any, TypeVar

from codefend.gateway.engine import Engine
from codefend.gateway.errors import Refused
from codefend.gateway.local import local_engine
from codefend.gateway.options import Mode, OnError
from codefend.gateway.routes import api_by_suffix
from codefend.gateway.wire import dump, parse
from codefend.purifiers.base import Purifier
from codefend.types import CodefendError

Client = TypeVar("Client")


def wrap(
    client: Client,
    purifier: str | Purifier = "bridge",
    *,
    prompt: str = "none",
    policy: Mode = "purify",
    threshold: float | None = None,
    on_error: OnError = "block",
    image_links: bool = False,
    tools: tuple[str, ...] = (),
) -> Client:
    """Return a copy of an official client, sync or async. Raises CodefendError for anything else and for unknown names.

    Images must be data URLs or base64; remote URLs and uploaded files are refused, because they cannot be seen here.
    With ``image_links`` http(s) images in Markdown and HTML pass as text; ``tools`` names tools by which the server may
    load content itself.

    >>> from openai import OpenAI
    >>> from codefend import wrap
    >>> client = wrap(OpenAI(base_url="http://localhost:8000/v1", api_key="unused"), "jpeg")
    >>> isinstance(client, OpenAI)
    True
    """
    inner: Any = getattr(client, "_client", None)
    copy: Any = getattr(client, "copy", None)
    http = _http_library(inner)
    if http is None or not callable(copy):
        raise CodefendError(f"cannot wrap {type(client).__name__}; give an OpenAI or Anthropic client")
    options: dict[str, Any] = {"prompt": prompt, "policy": policy, "threshold": threshold, "on_error": on_error}
    engine = local_engine(purifier, image_links=image_links, tools=tools, **options)
    wrapped: Client = _without_websockets(copy(http_client=_purifying(http, inner, engine)))
    return wrapped


def _purifying(http: Any, inner: Any, engine: Engine) -> Any:
    """An HTTP client that purifies requests and sends them with ``inner``."""
    kind, build = (
        (http.Client, _sync_transport) if isinstance(inner, http.Client) else (http.AsyncClient, _async_transport)
    )
    return kind(
        transport=build(http, inner, engine),
        base_url=inner.base_url,
        timeout=inner.timeout,
        headers=inner.headers,
        follow_redirects=inner.follow_redirects,
    )


class _NoAddress:
    def __repr__(self) -> str:
        return "<codefend purifies HTTP requests only: a wrapped client opens no WebSockets>"


def _without_websockets(client: Any) -> Any:
    """Leave its WebSockets without an address: each asks for it first, and the error then shows what it was given.

    In a class of the client's own, because that class makes its copies (``with_options``).
    """
    kind = type(client)
    address = property(lambda client: _NoAddress(), lambda client, address: None)
    client.__class__ = type(kind.__name__, (kind,), {"websocket_base_url": address, "__module__": kind.__module__})
    return client


def _http_library(inner: Any) -> ModuleType | None:
    """The library behind a client: ``httpx2``, or ``httpx`` in older releases of the official clients."""
    for kind in type(inner).__mro__:
        root = kind.__module__.partition(".")[0]
        if root in ("httpx2", "httpx") and kind.__name__ in ("Client", "AsyncClient"):
            return import_module(root)
    return None


def _sync_transport(http: Any, inner: Any, engine: Engine) -> Any:
    class Transport(http.BaseTransport):  # type: ignore[misc]
        def handle_request(self, request: Any) -> Any:
            request.read()
            changed = _rewritten(http, request, engine)
            return changed if isinstance(changed, http.Response) else inner.send(changed, stream=True)

        def close(self) -> None:
            inner.close()

    return Transport()


def _async_transport(http: Any, inner: Any, engine: Engine) -> Any:
    class Transport(http.AsyncBaseTransport):  # type: ignore[misc]
        async def handle_async_request(self, request: Any) -> Any:
            await request.aread()
            changed = await asyncio.to_thread(_rewritten, http, request, engine)
            return changed if isinstance(changed, http.Response) else await inner.send(changed, stream=True)

        async def aclose(self) -> None:
            await inner.aclose()

    return Transport()


def _rewritten(http: Any, request: Any, engine: Engine) -> Any:
    """The request with purified images, the same request, or a refusal as a response."""
    api = api_by_suffix(request.url.path)
    try:
        if not request.content:
            return request
        kind = request.headers.get("content-type", "application/json").partition(";")[0].strip()
        if kind != "application/json":
            if "/audio/" in request.url.path:
                return request
            raise Refused(415, "unknown_content", "only JSON can be inspected for images; uploads are not sent")
        outcome = engine.rewrite_now(api, parse(request.content))
    except Refused as refusal:
        return http.Response(refusal.status, content=refusal.body(api), headers={"content-type": "application/json"})
    if outcome.body is None:
        return request
    headers = [(key, value) for key, value in request.headers.raw if key.lower() != b"content-length"]
    return http.Request(
        request.method, request.url, headers=headers, content=dump(outcome.body), extensions=request.extensions
    )
