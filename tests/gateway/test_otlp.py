"""Spans as they arrive over OTLP: a receiver that decodes protobuf with OpenTelemetry's own definitions.

It stands for a collector. What a real one stored is in docs/notebook/2026-11.md.
"""

from __future__ import annotations

import gzip
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from codefend.gateway.app import create_app
from codefend.gateway.telemetry import Tracer, tracer_provider
from gateway_kit import CHAT, Invert, Upstream, chat, gateway, png, run, served, settings

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Receiver:
    """``POST /v1/traces`` as OTLP/HTTP has it."""

    def __init__(self) -> None:
        self.requests: list[ExportTraceServiceRequest] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        headers = dict(scope["headers"])
        assert (scope["path"], headers[b"content-type"]) == ("/v1/traces", b"application/x-protobuf")
        if headers.get(b"content-encoding") == b"gzip":
            body = gzip.decompress(body)
        self.requests.append(ExportTraceServiceRequest.FromString(body))
        content = ExportTraceServiceResponse().SerializeToString()
        head = [(b"content-type", b"application/x-protobuf"), (b"content-length", str(len(content)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        await send({"type": "http.response.body", "body": content})


def test_spans_arrive_at_a_receiver_of_otlp(monkeypatch: pytest.MonkeyPatch) -> None:
    receiver = Receiver()
    with served(receiver) as address:  # type: ignore[arg-type]
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", address)
        monkeypatch.setenv("OTEL_SERVICE_NAME", "gateway-7")
        provider = tracer_provider()
        monkeypatch.setattr("codefend.gateway.proxy.Tracer", lambda: Tracer(provider))

        async def work() -> None:
            upstream = Upstream()
            app = create_app(settings(), purifier=Invert(), transport=upstream.transport)
            async with gateway(upstream, app=app) as client:
                head = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "r-1"}
                assert (await client.post(CHAT, json=chat(png(1)), headers=head)).status_code == 200
                assert (await client.post(CHAT, json=chat(b""))).status_code == 400

        run(work())
        provider.shutdown()  # sends what is left
    resources = [resource for request in receiver.requests for resource in request.resource_spans]
    every = [span for resource in resources for scope in resource.scope_spans for span in scope.spans]
    spans = {span.name: span for span in every if span.trace_id.hex() == TRACE}
    request = spans.pop("codefend.request")
    assert request.parent_span_id.hex() == PARENT
    assert set(spans) == {"codefend.purify", "codefend.upstream"}
    assert {span.parent_span_id for span in spans.values()} == {request.span_id}
    attributes = {pair.key: pair.value.string_value for pair in spans["codefend.purify"].attributes}
    assert (attributes["route"], attributes["request_id"]) == (CHAT, "r-1")
    purify, refused = (span for span in every if span.trace_id.hex() != TRACE)
    assert (purify.trace_id, purify.parent_span_id) == (refused.trace_id, refused.span_id)
    assert "invalid_image" in {pair.value.string_value for pair in refused.attributes}
    (name,) = {pair.value.string_value for pair in resources[0].resource.attributes if pair.key == "service.name"}
    assert name == "gateway-7"
