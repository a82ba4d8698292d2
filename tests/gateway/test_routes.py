"""Only named routes are served, in one spelling."""

from __future__ import annotations

import pytest

from codefend.gateway.errors import Refused
from codefend.gateway.routes import GROUPS, Routes, api_of, check_path
from gateway_kit import Upstream, gateway, run

SERVED = [
    ("POST", "/v1/chat/completions"),
    ("GET", "/v1/models/org/name:7b"),
    ("HEAD", "/v1/models"),
    ("DELETE", "/v1/responses/r_1"),
    ("POST", "/v1/responses/r_1/cancel"),
    ("POST", "/v1/messages/count_tokens"),
]
NOT_SERVED = [
    ("GET", "/v1/organization/admin_api_keys"),
    ("DELETE", "/v1/models/m"),
    ("POST", "/v1/fine_tuning/jobs"),
    ("POST", "/v1/realtime/client_secrets"),
    ("POST", "/v1/Chat/completions"),
    ("POST", "/v1/audio/transcriptions"),
    ("GET", "/v1/files"),
    ("POST", "/v1/Batches"),
    ("POST", "/v1/tokenize"),
]


@pytest.mark.parametrize(("method", "path"), SERVED)
def test_the_apis_of_models_are_served(method: str, path: str) -> None:
    Routes().check(method, path)


@pytest.mark.parametrize(("method", "path"), NOT_SERVED)
def test_other_routes_reach_nobody(method: str, path: str) -> None:
    async def work() -> None:
        upstream = Upstream()
        async with gateway(upstream) as client:
            answer = await client.request(method, path)
        assert answer.status_code in (403, 404)
        assert answer.json()["error"]["code"] in ("unknown_route", "uploads_refused")
        assert not upstream.requests

    run(work())


def test_more_routes_by_name_or_path() -> None:
    routes = Routes(["chat", "tokenize", "POST /v1/pooling", "/v1/x/*"])
    for method, path in (("POST", "/v1/tokenize"), ("POST", "/v1/pooling"), ("PUT", "/v1/x/y/z")):
        routes.check(method, path)
    for method, path in (("GET", "/v1/pooling"), ("POST", "/v1/pooling/x"), ("POST", "/v1/embeddings")):
        with pytest.raises(Refused):
            routes.check(method, path)
    with pytest.raises(ValueError, match="did you mean 'rerank'"):
        Routes(["rerenk"])


def test_every_rule_is_written_well() -> None:
    Routes(list(GROUPS))


@pytest.mark.parametrize(
    "path",
    [
        "/v1/models/..;/x",
        "/v1/models/%2e%2e/x",
        "/v1/models/..",
        "/v1//models",
        "/v1/models\\x",
        "/v1/models/",
        "/v1/\n",
    ],
)
def test_paths_that_may_be_read_in_two_ways_are_refused(path: str) -> None:
    with pytest.raises(Refused):
        check_path(path)


LIFE_CYCLE = [
    ("GET", "/v1/files"),
    ("GET", "/v1/files/f_1"),
    ("GET", "/v1/files/f_1/content"),
    ("DELETE", "/v1/files/f_1"),
    ("GET", "/v1/batches/b_1"),
    ("POST", "/v1/batches/b_1/cancel"),
    ("POST", "/v1/batches"),
    ("GET", "/v1/messages/batches/b_1/results"),
]


def test_the_whole_life_cycle_of_uploads_passes_where_it_is_allowed() -> None:
    async def work() -> None:
        upstream = Upstream()
        async with gateway(upstream, allow_uploads=True) as client:
            for method, path in LIFE_CYCLE:
                body = {"input_file_id": "f", "endpoint": "/v1/chat/completions"} if path == "/v1/batches" else None
                answer = await client.request(method, path, json=body)
                assert answer.status_code == 200, (method, path, answer.text)
        assert len(upstream.requests) == len(LIFE_CYCLE)

    run(work())


def test_shapes() -> None:
    assert api_of("/v1/embeddings") == "texts"
    assert api_of("/v1/whatever") == "other"
