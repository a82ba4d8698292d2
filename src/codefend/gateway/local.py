"""An engine for use without the server: by the middleware, the client wrapper and the plug-ins."""

from __future__ import annotations

from dataclasses import replace

from codefend import prompts, purifiers
from codefend.gateway.engine import Engine, Terms
from codefend.gateway.lane import Lane
from codefend.gateway.options import LaneOptions, Limits, Mode, OnError
from codefend.gateway.shapes import Inspection
from codefend.gateway.worker import Worker, WorkerOptions
from codefend.purifiers.base import Purifier
from codefend.purifiers.text_policy import TextPolicyName


def local_engine(
    purifier: str | Purifier = "bridge",
    *,
    prompt: str = "none",
    policy: Mode = "purify",
    threshold: float | None = None,
    on_error: OnError = "block",
    image_links: bool = False,
    tools: tuple[str, ...] = (),
    limits: Limits | None = None,
    device: str = "cpu",
    text: TextPolicyName = "off",
    lane: LaneOptions | None = None,
) -> Engine:
    """Build an engine; with ``lane`` it also serves an event loop. ``image_links`` and ``tools`` are `Inspection`'s,
    ``text`` is the policy for text in images.

    Raises CodefendError for an unknown name, and as ``Terms.choose`` does.
    """
    limits = limits or Limits()
    loaded = purifiers.load(purifier) if isinstance(purifier, str) else purifier
    options = WorkerOptions(limits, device=device)
    worker, text_policy = Worker(loaded, options), prompts.load(prompt)
    return Engine(
        worker,
        lane=None if lane is None else Lane(worker, replace(lane, max_side=limits.max_side)),
        limits=limits,
        terms=Terms.choose(worker, policy, threshold, text),
        policy=None if text_policy.empty else text_policy,
        on_error=on_error,
        inspection=Inspection(image_links, tools),
        fallback=Worker(purifiers.load("jpeg"), options) if on_error == "fallback" else None,
    )
