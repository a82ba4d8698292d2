"""The guardrail webhook behind LiteLLM's own generic guardrail: what it writes back into a request.

LiteLLM pins versions of its own: run it in an environment that has both (`pip install litellm`).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest

from codefend.gateway.app import create_app
from gateway_kit import Invert, b64, chat, png, served, settings, url

pytest.importorskip("litellm.proxy.guardrails.guardrail_hooks.generic_guardrail_api", reason="LiteLLM is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
A = png(1)
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": b64(A)}}
PART = {"type": "input_image", "image_url": url(A), "detail": "auto"}
REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "openai.chat": ("OpenAIChatCompletionsHandler", chat(A)),
    "anthropic.chat": (
        "AnthropicMessagesHandler",
        {"model": "m", "messages": [{"role": "user", "content": [{"type": "text", "text": "what?"}, IMAGE]}]},
    ),
    "openai.responses": (
        "OpenAIResponsesHandler",
        {"model": "m", "input": [{"role": "user", "content": [{"type": "input_text", "text": "what?"}, PART]}]},
    ),
}


@pytest.fixture(scope="module")
def service() -> Iterator[str]:
    with served(create_app(settings(upstream="none", guardrails="litellm"), purifier=Invert())) as address:
        yield address


def through(service: str, api: str, request: dict[str, Any]) -> str:
    """The request as LiteLLM would send it on."""
    hooks = import_module("litellm.proxy.guardrails.guardrail_hooks.generic_guardrail_api.generic_guardrail_api")
    handlers = import_module(f"litellm.llms.{api}.guardrail_translation.handler")

    async def work() -> Any:
        guardrail = hooks.GenericGuardrailAPI(api_base=service, guardrail_name="codefend", event_hook="pre_call")
        data = json.loads(json.dumps(request))
        try:
            return await getattr(handlers, REQUESTS[api][0])().process_input_messages(data, guardrail)
        finally:
            await guardrail.async_handler.close()

    return json.dumps(asyncio.run(work()))


@pytest.mark.parametrize("api", REQUESTS)
def test_litellm_sends_the_purified_image(api: str, service: str) -> None:
    sent = through(service, api, REQUESTS[api][1])
    assert b64(A) not in sent
    assert "iVBORw0KGgo" in sent


@pytest.mark.parametrize("api", REQUESTS)
def test_litellm_blocks_what_cannot_be_purified(api: str, service: str) -> None:
    damaged = json.loads(json.dumps(REQUESTS[api][1]).replace(b64(A), b64(A)[:80]))
    with pytest.raises(Exception, match="damaged"):
        through(service, api, damaged)
