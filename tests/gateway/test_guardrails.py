"""Guardrail webhooks, with the requests of the three gateways as their documentation shows them."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import httpx2
import pytest
import torch
from starlette.applications import Starlette
from torch import Generator, Tensor

from codefend.core import images
from codefend.gateway.app import create_app
from codefend.gateway.guardrails import FORMS
from codefend.gateway.worker import WARM_UP_SIDE
from codefend.types import CodefendError
from gateway.test_attempts import ORIGINAL, REFUSED
from gateway_kit import Driver, Invert, Upstream, b64, chat, gateway, image, png, run, settings, url

A = png(1)

# https://docs.litellm.ai/docs/adding_provider/generic_guardrail_api, "Request Format" (BerriAI/litellm-docs, 2026-10)
LITELLM: dict[str, Any] = {
    "texts": ["extracted text from the request"],
    "tools": [
        {
            "type": "function",
            "function": {
                "name": "get_weather",
                "description": "Get the current weather",
                "parameters": {"type": "object", "properties": {"location": {"type": "string"}}},
            },
        }
    ],
    "tool_calls": [
        {
            "id": "call_abc123",
            "type": "function",
            "function": {"name": "get_weather", "arguments": '{"location": "San Francisco"}'},
        }
    ],
    "structured_messages": [
        {"role": "system", "content": "You are a helpful assistant"},
        {"role": "user", "content": "Hello"},
    ],
    "request_data": {"user_api_key_hash": "hash of the litellm virtual key used"},
    "request_headers": {"User-Agent": "OpenAI/Python 2.17.0", "X-Request-Id": "[present]"},
    "litellm_version": "1.110.2",
    "input_type": "request",
    "litellm_call_id": "unique_call_id",
    "litellm_trace_id": "trace_id",
    "additional_provider_specific_params": {},
}
# https://portkey.ai/docs/integrations/guardrails/bring-your-own-guardrails, "beforeRequestHook Example"
PORTKEY: dict[str, Any] = {
    "request": {
        "json": {
            "stream": False,
            "messages": [
                {"role": "system", "content": "You are a helpful assistant"},
                {"role": "user", "content": "Say Hi"},
            ],
            "max_tokens": 20,
            "n": 1,
            "model": "gpt-4o-mini",
        },
        "text": "Say Hi",
        "isStreamingRequest": False,
        "isTransformed": False,
    },
    "response": {"json": {}, "text": "", "statusCode": None, "isTransformed": False},
    "provider": "openai",
    "requestType": "chatComplete",
    "metadata": {"_user": "visarg123"},
    "eventType": "beforeRequestHook",
}
# https://github.com/tailscale/aperture-recipes/blob/main/docs/protocol-reference.md, "Example HookCallData"
APERTURE: dict[str, Any] = {
    "metadata": {
        "login_name": "alice@example.com",
        "user_agent": "claude-code/1.0",
        "url": "https://aperture.tail1234.ts.net/v1/messages",
        "model": "claude-sonnet-4-20250514",
        "provider": "anthropic",
        "tailnet_name": "example.ts.net",
        "stable_node_id": "nSTABLE123",
        "request_id": "req_abc123",
        "session_id": "sess_xyz789",
    },
    "request_body": {
        "model": "claude-sonnet-4-20250514",
        "max_tokens": 4096,
        "messages": [{"role": "user", "content": "Write a function that sorts a list"}],
    },
    "user_message": "Write a function that sorts a list",
}
PATHS = {
    "litellm": "/beta/litellm_basic_guardrail_api",
    "portkey": "/guardrails/portkey",
    "aperture": "/guardrails/aperture",
}
HOOKS = {"litellm": LITELLM, "portkey": PORTKEY, "aperture": APERTURE}
PASS = {"litellm": {"action": "NONE"}, "portkey": {"verdict": True}, "aperture": {"action": "allow"}}


def hook(form: str, data: str = "") -> dict[str, Any]:
    """The documented request, with an image in its last message where ``data`` is its base64."""
    body: dict[str, Any] = copy.deepcopy(HOOKS[form])
    if not data:
        return body
    part: dict[str, Any] = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    if form == "litellm":
        body["structured_messages"][1]["content"] = [{"type": "text", "text": "Hello"}, part]
        body["images"] = [part["image_url"]["url"]]
    elif form == "portkey":
        body["request"]["json"]["messages"][1]["content"] = [{"type": "text", "text": "Say Hi"}, part]
    else:
        source = {"type": "base64", "media_type": "image/png", "data": data}
        body["request_body"]["messages"][0]["content"] = [{"type": "image", "source": source}]
    return body


def replaced(form: str, answer: dict[str, Any]) -> Any:
    """The request, or of LiteLLM its messages, that the answer wants in place of the one that was sent."""
    if form == "litellm":
        assert answer.keys() == {"action", "structured_messages"}
        assert answer["action"] == "GUARDRAIL_INTERVENED"
        return answer["structured_messages"]
    if form == "portkey":
        assert answer["verdict"] is True
        return answer["transformedData"]["request"]["json"]
    assert answer["action"] == "modify"
    return answer["request_body"]


def blocked(form: str, answer: dict[str, Any]) -> str:
    """The reason of an answer that blocks, in the form's own words for that."""
    if form == "litellm":
        assert answer.keys() == {"action", "blocked_reason"}
        assert answer["action"] == "BLOCKED"
        return str(answer["blocked_reason"])
    if form == "portkey":
        assert answer["verdict"] is False
        assert "transformedData" not in answer
        return str(answer["data"])
    assert answer.keys() == {"action", "status_code", "message"}
    assert answer["action"] == "block"
    assert 400 <= answer["status_code"] < 600
    return str(answer["message"])


def alone(purifier: Any = None, **flags: Any) -> Starlette:
    """A service without an upstream."""
    return create_app(
        settings(**{"upstream": "none", "guardrails": ",".join(PATHS)} | flags), purifier=purifier or Invert()
    )


def answers(
    form: str, bodies: Sequence[Any], headers: dict[str, str] | None = None, purifier: Any = None, **flags: Any
) -> list[dict[str, Any]]:
    """The answers of such a service to one request after the other."""

    async def work() -> list[dict[str, Any]]:
        decoded = []
        async with gateway(Upstream(), app=alone(purifier, **flags)) as client:
            for body in bodies:
                content = {"content": body} if isinstance(body, bytes) else {"json": body}
                answer = await client.post(PATHS[form], **content, headers=headers)
                assert answer.status_code == 200
                decoded.append(answer.json())
        return decoded

    return run(work())


def ask(form: str, body: Any, headers: dict[str, str] | None = None, **options: Any) -> dict[str, Any]:
    (answer,) = answers(form, [body], headers, **options)
    return answer


@pytest.mark.parametrize("form", PATHS)
def test_a_documented_request_without_images_passes(form: str) -> None:
    assert ask(form, hook(form)) == PASS[form]


@pytest.mark.parametrize("form", PATHS)
def test_images_are_replaced_and_nothing_else(form: str) -> None:
    answer = replaced(form, ask(form, hook(form, b64(A))))
    original = hook(form, "X")
    before = {
        "litellm": lambda: original["structured_messages"],
        "portkey": lambda: original["request"]["json"],
        "aperture": lambda: original["request_body"],
    }[form]()
    (file,) = strings(answer, "iVBORw0KGgo")
    pixels = images.load(f"data:image/png;base64,{file.rpartition(',')[2]}").pixels
    assert torch.equal(pixels, images.quantize8(1 - image(1)))
    assert b64(A) not in file
    (place,) = strings(before, "X", exact=True)
    assert str(answer).replace(file, place) == str(before)


def strings(value: Any, start: str, *, exact: bool = False) -> Iterator[str]:
    if isinstance(value, str):
        content = value.rpartition("base64,")[2]
        if content == start if exact else content.startswith(start):
            yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from strings(inner, start, exact=exact)


@pytest.mark.parametrize("form", PATHS)
def test_an_image_that_cannot_be_purified_blocks(form: str) -> None:
    reasons = {"bm90IGFuIGltYWdl": "not an image", b64(A)[:80]: "damaged", "[omitted]": "base64"}
    for words, answer in zip(reasons.values(), answers(form, [hook(form, data) for data in reasons]), strict=True):
        assert words in blocked(form, answer)


@pytest.mark.parametrize("form", PATHS)
def test_what_is_no_request_blocks(form: str) -> None:
    bodies = [b"", b"[]", b"{", b'{"a":1,"a":2}', b"\xff"]
    for answer in answers(form, bodies if form == "litellm" else [*bodies, b"{}"]):  # there, all fields are optional
        blocked(form, answer)


class Failing(Invert):
    """Fails on all but the grey image by which it is warmed up."""

    def forward(self, images: Tensor, *, generator: Generator | None = None) -> Tensor:
        if images.shape[-1] != WARM_UP_SIDE:
            raise RuntimeError
        return images


@pytest.mark.parametrize("form", PATHS)
def test_failures_and_wrong_keys_block_with_status_200(form: str) -> None:
    """Any other status is a failure of the guardrail, on which Portkey and Aperture let requests pass by default."""
    assert "purification_failed" in blocked(form, ask(form, hook(form, b64(A)), purifier=Failing()))
    keys = {"api_keys": "opened-sesame"}
    for headers in ({}, {"authorization": "Bearer guess"}, {"x-api-key": "guess"}):
        assert "invalid_api_key" in blocked(form, ask(form, hook(form), headers, **keys))
    for headers in ({"authorization": "Bearer opened-sesame"}, {"x-api-key": "opened-sesame"}):
        assert ask(form, hook(form), headers, **keys) == PASS[form]
    assert "unknown_host" in blocked(form, ask(form, hook(form), allowed_hosts="other.example"))
    assert "body_too_large" in blocked(form, ask(form, hook(form, b64(A)), max_body_bytes=400))


def test_a_verdict_comes_before_the_callers_own_deadline() -> None:
    async def work() -> None:
        app = alone(guardrail_timeout_s=0.2)
        async with app.router.lifespan_context(app):
            driver = Driver(app, b"", path=PATHS["portkey"])

            async def silent() -> dict[str, Any]:
                await driver.gone.wait()
                return {"type": "http.disconnect"}

            driver.receive = silent  # type: ignore[method-assign]
            asking = asyncio.ensure_future(driver.run())
            await driver.until(2)
            await asking
            assert driver.sent[0]["status"] == 200
            assert b'"verdict":false' in driver.text

    run(work())
    waits = {form.path: form.answer_s for form in FORMS.values()}
    assert waits[PATHS["portkey"]] < 3  # its default, after which it goes on
    assert waits[PATHS["aperture"]] < 5  # its default, after which it goes on


# --- LiteLLM ----------------------------------------------------------------------------------------------------------


def test_an_older_litellm_which_would_send_the_original_blocks() -> None:
    for answer in answers("litellm", [hook("litellm", b64(A)) | {"litellm_version": v} for v in ("1.102.9", "", None)]):
        assert "before 1.103" in blocked("litellm", answer)


def test_images_that_litellm_could_not_replace_block() -> None:
    alone = hook("litellm", b64(A))
    del alone["structured_messages"]
    elsewhere = hook("litellm") | {"images": [url(A)]}
    written = hook("litellm") | {"structured_messages": None, "texts": [f"![a]({url(A)})"]}
    reasons = [blocked("litellm", answer) for answer in answers("litellm", [alone, elsewhere, written])]
    for words, reason in zip(("structured_messages", "outside of the messages", "Markdown"), reasons, strict=True):
        assert words in reason


def test_answers_of_models_pass() -> None:
    assert ask("litellm", hook("litellm") | {"input_type": "response"}) == PASS["litellm"]
    assert ask("portkey", hook("portkey") | {"eventType": "afterRequestHook"}) == PASS["portkey"]
    assert ask("aperture", hook("aperture") | {"response_body": {}}) == PASS["aperture"]


# --- Portkey and Aperture ---------------------------------------------------------------------------------------------


def test_other_kinds_of_requests_are_searched_and_block_with_an_image() -> None:
    kinds = ("complete", "embed", "imageGenerate")
    plain = {"model": "m", "input": "text", "prompt": "text"}
    bodies = [
        hook("portkey") | {"requestType": kind, "request": {"json": plain | extra}}
        for kind in kinds
        for extra in ({}, {"image": url(A)})
    ]
    given = answers("portkey", bodies)
    assert given[::2] == [PASS["portkey"]] * 3
    for answer in given[1::2]:
        blocked("portkey", answer)
    gemini = hook("aperture")
    gemini["metadata"]["url"] = "https://aperture.tail1234.ts.net/v1beta/models/gemini:generateContent"
    parts = {"text": "hi"}, {"inline_data": {"mime_type": "image/png", "data": b64(A)}}
    text, shot = answers("aperture", [gemini | {"request_body": {"contents": [{"parts": [part]}]}} for part in parts])
    assert text == PASS["aperture"]
    blocked("aperture", shot)


def test_a_hook_without_the_request_body_says_what_to_add() -> None:
    body = hook("aperture")
    del body["request_body"]
    assert "send" in blocked("aperture", ask("aperture", body))


def test_chat_completions_behind_aperture() -> None:
    body = hook("aperture")
    body["metadata"]["url"] = "https://aperture.tail1234.ts.net/v1/chat/completions"
    body["request_body"] = chat(A)
    answer = replaced("aperture", ask("aperture", body))
    assert list(strings(answer, "iVBORw0KGgo"))
    assert url(A) not in str(answer)


@pytest.mark.parametrize("form", PATHS)
def test_what_the_gateway_refuses_from_an_attacker_who_knows_it_does_not_pass(form: str) -> None:
    bodies = {name: body for name, (api, attempt) in REFUSED.items() if (body := _attempt(form, api, attempt))}
    assert len(bodies) > (15 if form == "litellm" else 35)
    for name, answer in zip(bodies, answers(form, list(bodies.values())), strict=True):
        assert answer != PASS[form], name
        assert b64(ORIGINAL)[:200] not in str(answer), name


def _attempt(form: str, api: str, attempt: Any) -> dict[str, Any] | None:
    """The request of an attempt as ``form`` would send it; None for an API, or a field, that it does not send."""
    body = hook(form)
    if form == "litellm":
        return body | {"structured_messages": attempt["messages"]} if attempt.keys() == {"messages"} else None
    kinds = {"chat": ("chatComplete", "chat/completions"), "messages": ("messages", "messages")}
    kind, path = (kinds | {"responses": ("createModelResponse", "responses")}).get(api, ("", ""))
    if form == "portkey":
        return body | {"requestType": kind, "request": {"json": attempt}} if kind else None
    body["metadata"]["url"] = f"https://aperture.tail1234.ts.net/v1/{path}"
    return body | {"request_body": attempt} if kind else None


# --- the service ------------------------------------------------------------------------------------------------------


def test_guardrails_and_proxy_share_one_service() -> None:
    async def work() -> None:
        upstream = Upstream()
        async with gateway(upstream, guardrails="portkey") as client:
            assert (await client.post("/v1/chat/completions", json=chat(A))).status_code == 200
            assert (await client.post(PATHS["portkey"], json=hook("portkey"))).json() == PASS["portkey"]
            assert (await client.post(PATHS["aperture"], json=hook("aperture"))).status_code == 404
            assert (await client.get(PATHS["portkey"])).status_code == 405
            metrics: httpx2.Response = await client.get("/metrics")
            assert 'route="/guardrails/portkey"' in metrics.text
        async with gateway(upstream, app=alone()) as client:
            assert (await client.post("/v1/chat/completions", json=chat())).status_code == 404

    run(work())


def test_a_service_of_nothing_does_not_start() -> None:
    with pytest.raises(CodefendError, match="give --upstream or --guardrails"):
        create_app(settings(upstream="none"), purifier=Invert())
    with pytest.raises(CodefendError, match="'litellm', 'portkey' or 'aperture'"):
        settings(guardrails="lite-llm")
