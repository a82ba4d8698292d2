"""Schemathesis against the running gateway: no request it can think of is a crash, and every refusal has its form."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, settings

from codefend.gateway.app import create_app
from gateway_kit import Invert, Upstream, served
from gateway_kit import settings as gateway_settings
from gateway_openapi import PNG, document

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
checks = schemathesis.checks
CHECKS = [
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]
schema = schemathesis.openapi.from_dict(document())


@pytest.fixture(scope="module")
def upstream() -> Upstream:
    return Upstream()


@pytest.fixture(scope="module")
def base(upstream: Upstream) -> Iterator[str]:
    with served(create_app(gateway_settings(), purifier=Invert(), transport=upstream.transport)) as url:
        yield url


@schema.parametrize()
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_request(case, base: str, upstream: Upstream) -> None:  # type: ignore[no-untyped-def]
    case.call_and_validate(base_url=base, checks=CHECKS)
    assert not any(PNG[22:].encode() in request.content for request in upstream.requests)
    upstream.requests.clear()
