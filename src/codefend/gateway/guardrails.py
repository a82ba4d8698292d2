"""Guardrail webhooks: other gateways ask here before they send a request on. LiteLLM, Portkey, Aperture.

Every answer has status 200 and a verdict, refusals and failures of this service included: to these gateways any other
status, and silence, is a failure of the guardrail, on which some of them pass the request on. So the answer also comes
before their own deadlines.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Mapping
from typing import Any, Protocol
from urllib.parse import urlsplit

from starlette.types import Receive, Scope, Send

from codefend.gateway.access import client_fields, send_verdict
from codefend.gateway.budget import BodyBudget, ClientGone, read_body
from codefend.gateway.config import Settings
from codefend.gateway.engine import Caller, Engine, Outcome
from codefend.gateway.errors import Api, Refused
from codefend.gateway.options import GuardrailName
from codefend.gateway.routes import api_by_suffix, api_of
from codefend.gateway.telemetry import Meters, log
from codefend.gateway.wire import dump, parse_long

Hook = Mapping[str, Any]  # what a gateway sends


class Form(Protocol):
    """How one gateway asks and wants to be answered."""

    path: str
    answer_s: float  # for an answer; below the gateway's own deadline where that lets requests pass

    def body(self, hook: Hook) -> tuple[Api, Any] | None:
        """The request to purify; None where there is nothing to decide. Raises Refused for what cannot be purified."""

    def check(self, hook: Hook, outcome: Outcome) -> None:
        """Raise Refused where the gateway would not use the images of ``outcome``."""

    def allow(self, body: Any) -> Any:
        """The answer that lets a request pass, with ``body`` in its place unless that is None."""

    def block(self, refusal: Refused) -> Any: ...


class LiteLLM:
    """The generic guardrail API, https://docs.litellm.ai/docs/adding_provider/generic_guardrail_api (2026-10).

    LiteLLM writes back ``structured_messages``, never ``images``, and that since version 1.103.
    """

    path: str = "/beta/litellm_basic_guardrail_api"
    answer_s: float = 30.0
    _SINCE = (1, 103)

    def body(self, hook: Hook) -> tuple[Api, Any] | None:
        if hook.get("input_type") == "response":
            return None
        messages = hook.get("structured_messages")
        if messages is not None:
            return "chat", {"messages": messages, "tools": hook.get("tools") or []}
        if hook.get("images"):
            raise Refused(400, "unknown_content", "LiteLLM takes images back in structured_messages, which are missing")
        return "other", {"texts": hook.get("texts"), "tool_calls": hook.get("tool_calls")}

    def check(self, hook: Hook, outcome: Outcome) -> None:
        images = hook.get("images") or []
        if len(outcome.images) < len(images):
            raise Refused(400, "unknown_content", "LiteLLM found images outside of the messages that it sent")
        version = re.match(r"(\d+)\.(\d+)", str(hook.get("litellm_version")))
        if outcome.images and (version is None or (int(version[1]), int(version[2])) < self._SINCE):
            raise Refused(400, "unknown_content", "LiteLLM before 1.103 does not use a guardrail's images")

    def allow(self, body: Any) -> Any:
        if body is None:
            return {"action": "NONE"}
        return {"action": "GUARDRAIL_INTERVENED", "structured_messages": body["messages"]}

    def block(self, refusal: Refused) -> Any:
        return {"action": "BLOCKED", "blocked_reason": f"{refusal.code}: {refusal.message}"}


class Portkey:
    """Webhook guardrails, https://portkey.ai/docs/integrations/guardrails/bring-your-own-guardrails (2026-09).

    After its deadline (3 s by default) Portkey goes on as if the verdict was true.
    """

    path: str = "/guardrails/portkey"
    answer_s: float = 2.5
    _APIS: Mapping[str, Api] = {
        "chatComplete": "chat",
        "messages": "messages",
        "createModelResponse": "responses",
        "embed": "texts",
    }

    def body(self, hook: Hook) -> tuple[Api, Any] | None:
        if hook.get("eventType") == "afterRequestHook":
            return None
        request = hook.get("request")
        if not isinstance(request, dict) or not isinstance(request.get("json"), dict):
            raise Refused(400, "invalid_request", "expected Portkey's request.json")
        return self._APIS.get(str(hook.get("requestType")), "other"), request["json"]

    def check(self, hook: Hook, outcome: Outcome) -> None: ...

    def allow(self, body: Any) -> Any:
        return {"verdict": True} | ({} if body is None else {"transformedData": {"request": {"json": body}}})

    def block(self, refusal: Refused) -> Any:
        return {"verdict": False, "data": {"code": refusal.code, "explanation": refusal.message}}


class Aperture:
    """Tailscale's hooks, https://tailscale.com/docs/aperture/guardrails and the protocol reference of aperture-recipes.

    After its deadline (5 s by default) Aperture does what the hook's ``fail_policy`` says, by default it goes on.
    """

    path: str = "/guardrails/aperture"
    answer_s: float = 4.5
    _AFTERWARDS = frozenset({"response_body", "raw_responses", "tool_calls"})  # an answer to these is not read

    def body(self, hook: Hook) -> tuple[Api, Any] | None:
        if self._AFTERWARDS & hook.keys():
            return None
        if "request_body" not in hook:
            raise Refused(400, "invalid_request", 'no request_body: name it in the "send" list of the grant\'s hook')
        metadata = hook.get("metadata")
        path = urlsplit(str(metadata.get("url"))).path if isinstance(metadata, dict) else ""
        api = api_by_suffix(path)
        return (api_of(path) if api == "other" else api), hook["request_body"]

    def check(self, hook: Hook, outcome: Outcome) -> None: ...

    def allow(self, body: Any) -> Any:
        return {"action": "allow"} if body is None else {"action": "modify", "request_body": body}

    def block(self, refusal: Refused) -> Any:
        return {"action": "block", "status_code": refusal.status, "message": f"{refusal.code}: {refusal.message}"}


FORMS: dict[GuardrailName, Form] = {"litellm": LiteLLM(), "portkey": Portkey(), "aperture": Aperture()}


class Guardrail:
    """The ASGI application behind the path of one form."""

    def __init__(self, form: Form, engine: Engine, settings: Settings, meters: Meters, budget: BodyBudget) -> None:
        self.form, self.engine, self.settings, self.meters, self.budget = form, engine, settings, meters, budget

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start, code = time.perf_counter(), ""
        try:
            async with asyncio.timeout(self.settings.guardrail_timeout_s or self.form.answer_s):
                answer = await self._answer(scope, receive)
        except ClientGone:
            self.meters.disconnects.inc()
            return
        except Refused as refusal:
            code, answer = refusal.code, dump(self.form.block(refusal))
        except TimeoutError:
            code = "purification_timeout"
            answer = dump(self.form.block(Refused(503, code, "the images were not purified in time")))
        except Exception as error:  # fail closed, whatever it is
            log.exception("internal error")
            code = "internal_error"
            answer = dump(self.form.block(Refused(500, code, f"internal error ({type(error).__name__})")))
        if code:
            self.meters.refused.labels(code).inc()
        await send_verdict(answer, send)
        self._record(scope, time.perf_counter() - start, code)

    async def _answer(self, scope: Scope, receive: Receive) -> bytes:
        client = str(scope.get("codefend.client", ""))
        with self.budget.lease(client) as lease:
            raw = await read_body(receive, self.settings.max_body_bytes, lease.take)
            hook = await self.engine.aside(len(raw), parse_long, raw)
            if not isinstance(hook, dict):
                raise Refused(400, "invalid_request", "the body must be a JSON object")
            question = self.form.body(hook)
            if question is None:
                return dump(self.form.allow(None))
            outcome = await self.engine.rewrite(*question, caller=Caller(client, lease.take), size=len(raw))
            self.form.check(hook, outcome)
            return await self.engine.aside(len(raw), dump, self.form.allow(outcome.body))

    def _record(self, scope: Scope, seconds: float, code: str) -> None:
        self.meters.requests.labels(self.form.path, "200").inc()
        self.meters.seconds.labels(self.form.path).observe(seconds)
        fields = {"path": self.form.path, "status": 200, "ms": round(seconds * 1000, 2)} | client_fields(scope)
        log.info("request", extra={"fields": fields | ({"code": code} if code else {})})
