"""A LiteLLM guardrail that replaces the images.

Only ``async_pre_call_hook`` is defined, on purpose: LiteLLM routes a class with ``apply_guardrail`` to another path,
which discards the images that a guardrail returns (LiteLLM issue 31071). In LiteLLM's configuration::

    guardrails:
      - guardrail_name: codefend
        litellm_params:
          guardrail: codefend.integrations.litellm.CodefendGuardrail
          mode: pre_call
          default_on: true

Images are purified where chat completions, responses and Anthropic messages have them. Anywhere else in a call, as in
``fallbacks``, ``extra_body`` or another kind of call, they are refused; so are calls whose contents follow over a
WebSocket, and tools by which the model's server loads content itself, unless ``tools`` names them.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

from codefend.gateway.errors import Api, Refused
from codefend.gateway.local import local_engine
from codefend.gateway.options import LaneOptions, OnError
from codefend.purifiers.base import Purifier

_Base: Any = import_module("litellm.integrations.custom_guardrail").CustomGuardrail
_OWN = frozenset({"metadata", "proxy_server_request", "secret_fields", "standard_logging_object"})


class CodefendGuardrail(_Base):  # type: ignore[misc]
    """Every image of a call is purified in place; one that cannot be is an error, and the call is not made."""

    def __init__(
        self,
        purifier: str | Purifier = "bridge",
        prompt: str = "none",
        on_error: OnError = "block",
        image_links: bool = False,
        tools: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.engine = local_engine(
            purifier,
            prompt=prompt,
            on_error=on_error,
            image_links=image_links,
            tools=tuple(tools),
            lane=LaneOptions(),
        )

    async def async_pre_call_hook(
        self, user_api_key_dict: Any, cache: Any, data: dict[str, Any], call_type: str
    ) -> Any:
        """Rewrite ``data`` and return it. Raises an HTTP error for what cannot be inspected."""
        body = {key: value for key, value in data.items() if key not in _OWN and not key.startswith("litellm_")}
        try:
            if "realtime" in call_type or "websocket" in call_type:
                raise Refused(400, "unknown_content", "what follows over a WebSocket cannot be inspected for images")
            outcome = await self.engine.rewrite(_api(data, call_type), body)
        except Refused as refusal:
            raise _http_error(refusal) from refusal
        if outcome.body is not None:
            changed = {key: value for key, value in outcome.body.items() if value is not body.get(key)}
            data.update(changed)
            logged = data.get("proxy_server_request")
            if isinstance(logged, dict) and isinstance(logged.get("body"), dict):
                logged["body"] = {**logged["body"], **changed}  # loggers must not record originals
        return data


def _api(data: dict[str, Any], call_type: str) -> Api:
    if "anthropic" in call_type:
        return "messages"
    if "responses" in call_type:
        return "responses"
    return "chat" if isinstance(data.get("messages"), list) else "other"


def _http_error(refusal: Refused) -> Exception:
    try:
        kind = import_module("fastapi").HTTPException
    except ModuleNotFoundError:
        return refusal
    error: Exception = kind(refusal.status, {"error": refusal.message, "code": refusal.code, "where": refusal.where})
    return error
