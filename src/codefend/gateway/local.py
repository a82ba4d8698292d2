"""An engine for use without the server: by the middleware, the client wrapper and the plug-ins."""

from __future__ import annotations

from codefend import prompts, purifiers
from codefend.gateway.engine import Engine, OnError, Terms
from codefend.gateway.errors import Api
from codefend.gateway.lane import Lane, LaneOptions
from codefend.gateway.limits import Limits
from codefend.gateway.worker import Mode, Worker
from codefend.purifiers.base import Purifier

_SUFFIXES: dict[str, Api] = {
    "/chat/completions": "chat",
    "/responses": "responses",
    "/responses/input_tokens": "responses",
    "/messages": "messages",
    "/messages/count_tokens": "messages",
}


def local_engine(
    purifier: str | Purifier = "bridge",
    *,
    prompt: str = "none",
    policy: Mode = "purify",
    threshold: float | None = None,
    on_error: OnError = "block",
    image_links: bool = False,
    limits: Limits | None = None,
    device: str = "cpu",
    lane: LaneOptions | None = None,
) -> Engine:
    """Build an engine; with ``lane`` it also serves an event loop. ``image_links`` is that of ``survey``.

    Raises CodefendError for an unknown name, and as ``Terms.choose`` does.
    """
    limits = limits or Limits()
    loaded = purifiers.load(purifier) if isinstance(purifier, str) else purifier
    worker = Worker(loaded, limits=limits, device=device)
    words = prompts.load(prompt)
    return Engine(
        worker,
        lane=None if lane is None else Lane(worker, lane),
        limits=limits,
        terms=Terms.choose(worker, policy, threshold),
        policy=None if words.empty else words,
        on_error=on_error,
        image_links=image_links,
        fallback=Worker(purifiers.load("jpeg"), limits=limits) if on_error == "fallback" else None,
    )


def api_by_suffix(path: str) -> Api:
    """Name the request shape of a path under any prefix, as in ``/openai/deployments/x/chat/completions``."""
    path = path.rstrip("/")
    return next((api for suffix, api in _SUFFIXES.items() if path.endswith(suffix)), "other")
