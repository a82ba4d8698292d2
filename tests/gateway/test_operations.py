"""Keys, logs, metrics, traces, readiness and the page."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
import time
from collections.abc import AsyncIterator

import httpx2
import pytest
import torch

from codefend.core import images
from codefend.gateway.app import create_app
from codefend.gateway.telemetry import Tracer
from gateway_kit import CHAT, Invert, Upstream, chat, gateway, image, png, run, settings, url

A, B = png(1), png(2)


def test_keys_guard_all_but_health_and_the_static_page() -> None:
    async def work() -> None:
        upstream = Upstream()
        async with gateway(upstream, api_keys="sesame-open", upstream_api_key="upstream-secret") as client:
            for path in ("/healthz", "/readyz", "/"):
                assert (await client.get(path)).status_code == 200
            for path in ("/metrics", "/v1/models", "/page/info", "/docs"):
                assert (await client.get(path)).status_code == 401
            wrong = await client.post("/v1/messages", json={}, headers={"x-api-key": "sesame-opem"})
            assert wrong.json()["error"]["type"] == "authentication_error"
            for headers in (
                {"authorization": "Bearer sesame-open"},
                {"x-api-key": "sesame-open"},
                {"x-codefend-key": "sesame-open", "authorization": "Bearer of-the-client"},
            ):
                assert (await client.get("/v1/models", headers=headers)).status_code == 200
        for request in upstream.requests:
            assert "sesame-open" not in str(request.headers.raw)
            assert request.headers["authorization"] == "Bearer upstream-secret"
            assert request.headers["x-api-key"] == "upstream-secret"

    run(work())


def test_the_clients_own_upstream_key_passes_beside_the_gateways() -> None:
    async def work() -> None:
        upstream = Upstream()
        async with gateway(upstream, api_keys="sesame-open") as client:
            await client.get("/v1/models", headers={"x-codefend-key": "sesame-open", "authorization": "Bearer theirs"})
            await client.get("/v1/models", headers={"authorization": "Bearer sesame-open"})
        assert upstream.requests[0].headers["authorization"] == "Bearer theirs"
        assert "authorization" not in upstream.requests[1].headers

    run(work())


def test_logs_hold_no_keys_and_no_pixels(caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        async with gateway(Upstream(), api_keys="sesame-open", on_error="pass") as client:
            headers = {"authorization": "Bearer sesame-open", "x-request-id": "bad id\x7f", "cookie": "c=secret"}
            await client.post(f"{CHAT}?key=secret", json=chat(A), headers=headers)
            await client.post(CHAT, json=chat(A[:60], text="secret"), headers=headers)

    from codefend.gateway.telemetry import JsonFormatter

    with caplog.at_level(logging.DEBUG, logger="codefend"):
        run(work())
    lines = [json.loads(JsonFormatter().format(r)) for r in caplog.records if r.name == "codefend.gateway"]
    assert [line["status"] for line in lines] == [200, 400]
    assert lines[0]["images"] == 1
    assert lines[1]["code"] == "invalid_image"
    assert all(len(line["request_id"]) == 16 for line in lines)
    text = json.dumps(lines)
    assert "sesame" not in text
    assert "secret" not in text
    assert "iVBOR" not in text


def test_metrics_count_what_happened() -> None:
    async def work() -> None:
        async with gateway(Upstream()) as client:
            for _ in range(2):
                await client.post(CHAT, json=chat(A))
            await client.get("/v1/models/whatever")
            text = (await client.get("/metrics")).text
        for line in (
            'codefend_requests_total{route="/v1/chat/completions",status="200"} 2.0',
            'codefend_requests_total{route="/v1/*",status="200"} 1.0',
            'codefend_images_total{result="purified"} 1.0',
            'codefend_images_total{result="cached"} 1.0',
            "codefend_queue_images 0.0",
            "codefend_in_flight 0.0",
            "codefend_batch_images_sum 1.0",
        ):
            assert line in text, line

    run(work())


def test_images_outside_of_the_proxy_are_counted() -> None:
    async def work() -> None:
        async with gateway(Upstream(), guardrails="portkey") as client:
            await client.post("/page/purify", json={"image": url(A)})
            hook = {"eventType": "beforeRequestHook", "requestType": "chatComplete", "request": {"json": chat(B)}}
            await client.post("/guardrails/portkey", json=hook)
            await client.post(CHAT, json=chat(A, B))
            text = (await client.get("/metrics")).text
        for line in (
            'codefend_images_total{result="purified"} 2.0',
            'codefend_images_total{result="cached"} 2.0',
            "codefend_score_count 2.0",
        ):
            assert line in text, line

    run(work())


def test_not_ready_before_the_start_and_after_the_end() -> None:
    async def work() -> None:
        app = create_app(settings(), purifier=Invert(), transport=Upstream().transport)
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://g") as client:
            assert (await client.get("/readyz")).status_code == 503
            async with app.router.lifespan_context(app):
                assert (await client.get("/readyz")).status_code == 200
            assert (await client.get("/readyz")).status_code == 503
            assert (await client.get("/healthz")).status_code == 200
            late = await client.post(CHAT, json=chat(A))
            assert late.status_code in (500, 503)

    run(work())


def test_traces_carry_on_where_an_sdk_is_configured() -> None:
    from opentelemetry.sdk import trace as sdk
    from opentelemetry.sdk.trace import export
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    memory = InMemorySpanExporter()
    provider = sdk.TracerProvider()
    provider.add_span_processor(export.SimpleSpanProcessor(memory))

    async def work() -> None:
        upstream = Upstream()
        app = create_app(settings(), purifier=Invert(), transport=upstream.transport)
        proxy = next(route.app for route in app.routes if getattr(route, "path", "") == "/v1")
        given = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
        async with gateway(upstream, app=app) as client:
            await client.post(CHAT, json=chat(), headers={"traceparent": given})
            assert upstream.requests[-1].headers["traceparent"] == given, "without an SDK it passes as it came"
            proxy.tracer = Tracer(provider)
            await client.post(CHAT, json=chat(), headers={"traceparent": given})
        onward = upstream.requests[-1].headers["traceparent"]
        assert onward.split("-")[1] == given.split("-")[1]
        assert onward != given
        spans = memory.get_finished_spans()
        assert [span.name for span in spans] == ["codefend.purify", "codefend.upstream", "codefend.request"]
        request_id = upstream.requests[-1].headers["x-request-id"]
        assert {span.attributes["request_id"] for span in spans} == {request_id}

    run(work())


def test_the_gateway_does_not_load_victims() -> None:
    names = "app serve client middleware"
    script = "import sys\n" + "".join(f"import codefend.gateway.{name}\n" for name in names.split())
    script += (
        "heavy = {'transformers', 'codefend.victims', 'codefend.attacks', 'codefend.tasks', 'codefend.training'}\n"
    )
    script += "print(sorted(heavy & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_needs_no_outside_assets() -> None:
    async def work() -> None:
        async with gateway(Upstream()) as client:
            page = await client.get("/")
        assert page.headers["content-security-policy"].startswith("default-src 'none'")
        assert "http://" not in page.text
        assert "https://" not in page.text

    run(work())


def test_a_hostile_body_does_not_hold_the_event_loop() -> None:
    """By the CPU time of the loop's own thread between two of its steps, which a busy machine does not change."""
    body = b'{"image": [' + b"{}," * 5_000_000 + b"{}]}"

    async def work() -> None:
        longest, done = 0.0, False

        async def watch() -> None:
            nonlocal longest
            while not done:
                start = time.thread_time()
                await asyncio.sleep(0)
                longest = max(longest, time.thread_time() - start)

        async with gateway(Upstream(), demo=True) as client:
            watching = asyncio.create_task(watch())
            await asyncio.sleep(0)  # the watch begins before the first request
            kind = {"content-type": "application/json"}
            for path in ("/page/purify", "/page/undefended"):
                answer = await client.post(path, content=body, headers=kind)
                assert answer.status_code == 413, answer.text
            done = True
            await watching
        assert longest < 0.05

    run(work())


def test_the_page_can_purify_and_where_allowed_compare() -> None:
    async def work() -> None:
        upstream = Upstream()
        async with gateway(upstream) as client:
            done = (await client.post("/page/purify", json={"image": url(A)})).json()
            bad = await client.post("/page/purify", json={"image": 3})
            closed = await client.post("/page/undefended", json=chat(A))
        torch.testing.assert_close(images.load(done["image"]).pixels, 1 - image(1))
        assert done["score"] is None, "an attacker could climb it"
        assert (bad.status_code, closed.status_code) == (400, 403)
        assert not upstream.requests
        async with gateway(upstream, demo=True) as client:
            assert (await client.get("/page/info")).json()["demo"] is True
            score = (await client.post("/page/purify", json={"image": url(A)})).json()["score"]
            answer = await client.post("/page/undefended", json=chat(A))
            metrics = (await client.get("/metrics")).text
        assert answer.json() == {"ok": True}
        assert score == pytest.approx(float(image(1).mean()))
        torch.testing.assert_close(upstream.images()[0], image(1))
        assert 'codefend_bypass_total{reason="demo"} 1.0' in metrics

    run(work())


def test_an_upstream_that_breaks_off_is_an_error_of_the_page() -> None:
    class Broken(httpx2.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            yield b"{"
            raise httpx2.ReadError("gone")

    async def work() -> None:
        async with gateway(
            Upstream(handler=lambda request: httpx2.Response(200, stream=Broken())), demo=True
        ) as client:
            answer = await client.post("/page/undefended", json=chat(A))
            metrics = (await client.get("/metrics")).text
        assert (answer.status_code, answer.json()["error"]["code"]) == (502, "upstream_broken")
        assert 'codefend_upstream_errors_total{kind="broken"} 1.0' in metrics

    run(work())
