"""The memory of request bodies is bounded, for all and for each client."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from codefend.gateway.app import create_app
from codefend.gateway.budget import BodyBudget
from codefend.gateway.errors import Refused
from codefend.gateway.options import BudgetOptions
from gateway_kit import CHAT, Driver, Invert, Upstream, chat, gateway, png, run, settings


def test_a_lease_gives_back_what_it_took() -> None:
    budget = BodyBudget(BudgetOptions(total=100, client=60))
    with budget.lease("a") as a, budget.lease("b") as b:
        a.take(50)
        b.take(50)
        with pytest.raises(Refused) as full:
            b.take(1)
        assert (full.value.status, full.value.retry_seconds) == (503, 2)
    assert budget.used == 0
    with budget.lease("a") as a:
        a.take(60)
        with pytest.raises(Refused) as share:
            a.take(1)
        assert share.value.status == 429
    assert budget.used == 0


class Unfinished(Driver):
    """Sends its body and never says that it is complete."""

    async def receive(self) -> dict[str, Any]:
        message = await super().receive()
        return message | {"more_body": True} if message["type"] == "http.request" else message


def test_unfinished_bodies_do_not_add_up() -> None:
    async def work() -> None:
        flags = {"max_buffer_bytes": 1 << 20, "max_body_bytes": 1 << 20, "body_timeout_s": 0.5}
        app = create_app(settings(**flags), purifier=Invert(), transport=Upstream().transport)
        async with app.router.lifespan_context(app):
            drivers = [Unfinished(app, b"x" * 400_000) for _ in range(4)]
            tasks = [asyncio.create_task(driver.run()) for driver in drivers]
            await asyncio.sleep(0.1)
            metrics = app.state.meters.text().decode()
            await asyncio.gather(*tasks)
        statuses = sorted(driver.sent[0]["status"] for driver in drivers)
        assert statuses == [408, 408, 503, 503]
        assert "codefend_body_bytes 800000.0" in metrics

    run(work())


def test_requests_that_are_done_hold_nothing() -> None:
    async def work() -> None:
        async with gateway(Upstream(), max_buffer_bytes=10_000, max_body_bytes=10_000) as client:
            for seed in range(5):
                assert (await client.post(CHAT, json=chat(png(seed)))).status_code == 200
            assert "codefend_body_bytes 0.0" in (await client.get("/metrics")).text

    run(work())
