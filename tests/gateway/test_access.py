"""Hosts, keys, rates and browsers: who is let in, and what is logged of those who are not."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest

from codefend.gateway.access import Keys, visible_address
from codefend.gateway.app import create_app
from codefend.gateway.errors import Refused
from codefend.gateway.telemetry import JsonFormatter
from gateway_kit import CHAT, Invert, Upstream, chat, gateway, png, run, settings, url

KEY = {"authorization": "Bearer sesame-open"}


def test_a_key_in_two_headers_reaches_nobody() -> None:
    async def work() -> None:
        upstream = Upstream()
        async with gateway(upstream, api_keys="sesame-open,another-key") as client:
            await client.get("/v1/models", headers=KEY | {"x-api-key": "sesame-open"})
            await client.get("/v1/models", headers=KEY | {"x-codefend-key": "sesame-open", "x-api-key": "theirs"})
            two = await client.get("/v1/models", headers=KEY | {"x-api-key": "another-key"})
        assert two.status_code == 400
        assert len(upstream.requests) == 2
        assert not any(b"sesame" in value for request in upstream.requests for _, value in request.headers.raw)
        assert upstream.requests[1].headers["x-api-key"] == "theirs"

    run(work())


def test_refusals_are_logged_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> str:
        async with gateway(Upstream(), api_keys="sesame-open") as client:
            await client.post(CHAT, json=chat(), headers={"authorization": "Bearer wrong-key"})
            await client.get("/nothing", headers=KEY)
            await client.get("/page/purify", headers=KEY)
            await client.post(CHAT, json=chat(png(1)), headers=KEY)
            return (await client.get("/metrics", headers=KEY)).text

    with caplog.at_level(logging.INFO, logger="codefend"):
        metrics = run(work())
    lines = [json.loads(JsonFormatter().format(r)) for r in caplog.records if r.message == "request"]
    assert [line["status"] for line in lines] == [401, 404, 405, 200]
    assert [line.get("code") for line in lines] == ["invalid_api_key", "not_found", "method_not_allowed", None]
    assert "key" not in lines[0]
    assert all(line["client"] == "127.0.0.0" for line in lines)
    assert len(lines[3]["key"]) == 8
    assert "sesame" not in json.dumps(lines)
    assert "wrong-key" not in json.dumps(lines)
    for code in ("invalid_api_key", "not_found", "method_not_allowed"):
        assert f'codefend_refused_total{{code="{code}"}} 1.0' in metrics
    assert "codefend_score_count 1.0" in metrics
    assert 'purifier="invert"' in next(line for line in metrics.splitlines() if line.startswith("codefend_build_info{"))
    assert "process_resident_memory_bytes" in metrics


@pytest.mark.parametrize(
    ("address", "policy", "visible"),
    [
        ("192.0.2.77", "masked", "192.0.2.0"),
        ("2001:db8:1:2:3::4", "masked", "2001:db8:1::"),
        ("192.0.2.77", "full", "192.0.2.77"),
        ("192.0.2.77", "none", ""),
        ("unix:socket", "masked", ""),
    ],
)
def test_addresses_in_the_logs(address: str, policy: str, visible: str) -> None:
    assert visible_address(address, policy) == visible


def test_a_name_that_leads_here_from_elsewhere_is_refused() -> None:
    async def work() -> None:
        async with gateway(Upstream(), allowed_hosts="localhost,::1,gateway.test") as client:
            for host, status in (("localhost:8800", 200), ("[::1]:8800", 200), ("evil.test", 421), ("", 421)):
                assert (await client.get("/page/info", headers={"host": host})).status_code == status, host
                assert (await client.get("/v1/models", headers={"host": host})).status_code == status, host
                assert (await client.get("/healthz", headers={"host": host})).status_code == 200

    run(work())


@pytest.mark.parametrize("name", ["host", "origin"])
def test_a_malformed_address_in_a_header_is_refused(name: str) -> None:
    async def work() -> None:
        flags: dict[str, Any] = {"allowed_hosts": "gateway.test", "guardrails": "portkey", "api_keys": "sesame-open"}
        async with gateway(Upstream(), **flags) as client:
            for value in ("[", "http://[", "[x]", "http://[x]"):
                answer = await client.post("/page/purify", json={}, headers={name: value})
                assert answer.json()["error"]["code"] in ("invalid_header", "unknown_host", "cross_site"), answer.text
                assert answer.status_code in (400, 403, 421)
            verdict = await client.post("/guardrails/portkey", json={}, headers={"host": "["})
        assert (verdict.status_code, verdict.json()["verdict"]) == (200, False)
        assert verdict.json()["data"]["code"] == "invalid_header"

    run(work())


CROSS_SITE: list[dict[str, str]] = [
    {"content-type": "text/plain"},
    {"content-type": "application/json", "origin": "https://evil.test"},
    {"content-type": "application/json", "sec-fetch-site": "cross-site"},
    {},
]


@pytest.mark.parametrize("headers", CROSS_SITE)
def test_another_sites_page_cannot_use_the_page(headers: dict[str, str]) -> None:
    async def work() -> None:
        async with gateway(Upstream(), demo=True) as client:
            body = json.dumps({"image": url(png(1))}).encode()
            for path in ("/page/purify", "/page/undefended", "/page/attack", "/page/sample"):
                assert (await client.post(path, content=body, headers=headers)).status_code in (403, 415)
            same = {
                "content-type": "application/json",
                "origin": "http://gateway.test",
                "sec-fetch-site": "same-origin",
            }
            assert (await client.post("/page/purify", content=body, headers=same)).status_code == 200

    run(work())


def test_rates_per_key() -> None:
    async def work() -> None:
        async with gateway(Upstream(), api_keys="sesame-open,another-key", requests_per_minute=2) as client:
            statuses = [(await client.get("/v1/models", headers=KEY)).status_code for _ in range(3)]
            other = await client.get("/v1/models", headers={"x-api-key": "another-key"})
            refused = await client.get("/v1/models", headers=KEY)
        assert statuses == [200, 200, 429]
        assert other.status_code == 200
        assert 1 <= int(refused.headers["retry-after"]) <= 60

    run(work())


def test_the_pages_work_counts_to_the_rate_of_its_key() -> None:
    async def work() -> None:
        async with gateway(Upstream(), api_keys="sesame-open", requests_per_minute=2, demo=True) as client:
            for _ in range(3):
                assert (await client.get("/page/info", headers=KEY)).status_code == 200
            body = {"image": url(png(1))}
            answers = [await client.post("/page/purify", json=body, headers=KEY) for _ in range(2)]
            answers += [
                await client.post(path, json=chat(png(1)), headers=KEY)
                for path in ("/page/purify", "/page/undefended", "/page/sample", "/page/attack", CHAT)
            ]
        assert [answer.status_code for answer in answers] == [200, 200, 429, 429, 429, 429, 429]

    run(work())


def test_other_origins_by_configuration() -> None:
    async def work() -> None:
        ask = {"origin": "https://app.test", "access-control-request-method": "POST"}
        async with gateway(Upstream(), cors_origins="https://app.test", api_keys="sesame-open") as client:
            allowed = await client.options(CHAT, headers=ask)
            refused = await client.options(CHAT, headers=ask | {"origin": "https://evil.test"})
        assert allowed.headers["access-control-allow-origin"] == "https://app.test"
        assert "access-control-allow-origin" not in refused.headers
        async with gateway(Upstream()) as client:
            assert "access-control-allow-origin" not in (await client.options(CHAT, headers=ask)).headers

    run(work())


def test_keys_and_policies_are_reloaded_while_requests_run() -> None:
    async def work() -> list[int]:
        upstream = Upstream()
        app = create_app(settings(api_keys="sesame-open"), purifier=Invert(), transport=upstream.transport)
        async with gateway(upstream, app=app) as client:
            body: dict[str, Any] = chat(png(1))
            statuses = [(await client.post(CHAT, json=body, headers=KEY)).status_code]
            app.state.reload(settings(api_keys="another-key", policy="block", threshold=0.1))
            statuses.append((await client.post(CHAT, json=body, headers=KEY)).status_code)
            statuses.append((await client.post(CHAT, json=body, headers={"x-api-key": "another-key"})).status_code)
        return statuses

    assert run(work()) == [200, 401, 400]


def test_the_upstreams_key_is_reloaded() -> None:
    async def work() -> list[str]:
        upstream = Upstream()
        app = create_app(settings(upstream_api_key="old-key"), purifier=Invert(), transport=upstream.transport)
        async with gateway(upstream, app=app) as client:
            await client.post(CHAT, json=chat(png(1)))
            app.state.reload(settings(upstream_api_key="new-key"))
            await client.post(CHAT, json=chat(png(1)))
        return [request.headers["authorization"] for request in upstream.requests]

    assert run(work()) == ["Bearer old-key", "Bearer new-key"]


def test_keys_are_compared_with_all_headers() -> None:
    keys = Keys(["sesame-open"])
    with pytest.raises(Refused):
        keys.match([(b"authorization", b"Bearer other-key")])
    match = keys.match([(b"x-api-key", b"sesame-open"), (b"authorization", b"bearer sesame-open")])
    assert match.headers == {b"x-api-key", b"authorization"}
    assert match.digest not in "sesame-open"


def test_a_key_may_have_routes_of_its_own() -> None:
    keys = "sesame-open\nembed-only embeddings models\nuploads-only uploads"
    batch = json.dumps({"custom_id": "1", "method": "POST", "url": CHAT, "body": chat(png(1))}).encode()

    async def work() -> list[Any]:
        answers = []
        async with gateway(Upstream(), api_keys=keys, allow_uploads=True) as client:
            for key in ("sesame-open", "embed-only", "uploads-only"):
                header = {"x-api-key": key}
                answers.append(await client.post(CHAT, json=chat(png(1)), headers=header))
                answers.append(await client.post("/v1/embeddings", json={"input": "x"}, headers=header))
                files, data = {"file": ("a.jsonl", batch)}, {"purpose": "batch"}
                answers.append(await client.post("/v1/files", files=files, data=data, headers=header))
        return answers

    answers = run(work())
    assert [answer.status_code for answer in answers] == [200, 200, 200, 403, 200, 403, 403, 403, 403]
    assert {answer.json()["error"]["code"] for answer in answers if answer.status_code == 403} == {"route_refused"}
    assert answers[-1].json()["error"]["param"] == "line 1", "a batch uses no route that its key may not use"


def test_the_page_asks_no_model_for_a_key_without_chat() -> None:
    async def work() -> None:
        upstream = Upstream()
        async with gateway(upstream, api_keys="embed-only embeddings", demo=True) as client:
            for path in ("/page/undefended", "/page/sample", "/page/attack"):
                answer = await client.post(path, json=chat(png(1)), headers={"x-api-key": "embed-only"})
                assert (answer.status_code, answer.json()["error"]["code"]) == (403, "route_refused"), path
        async with gateway(upstream, routes="embeddings", demo=True) as client:
            answer = await client.post("/page/undefended", json=chat(png(1)))
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_route")
        assert not upstream.requests

    run(work())


def test_scores_are_for_operators() -> None:
    async def header(**flags: Any) -> str | None:
        async with gateway(Upstream(), **flags) as client:
            return (await client.post(CHAT, json=chat(png(1)))).headers.get("x-codefend-score")

    assert run(header()) is None
    assert run(header(scores="round")) == "0.5"
    assert len(run(header(scores="exact")) or "") == 6
