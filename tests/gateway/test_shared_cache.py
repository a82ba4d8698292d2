"""Replicas share purified images through a real Redis; what it says is checked, and without it all works."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from torch import Generator, Tensor

from codefend.gateway.app import create_app
from codefend.gateway.config import load_settings
from codefend.gateway.lane import Lane, digest_of
from codefend.gateway.options import LaneOptions
from codefend.gateway.shared_cache import SharedCache
from codefend.gateway.worker import Job, Purified, Worker, WorkerOptions
from codefend.purifiers import load
from codefend.types import CodefendError
from gateway_kit import Invert, png, run
from redis_kit import redis_server

SECRET = b"a secret of all replicas"


class CountedInvert(Invert):
    calls = 0

    def forward(self, images: Tensor, *, generator: Generator | None = None) -> Tensor:
        self.calls += 1
        return super().forward(images, generator=generator)


class Replica:
    """A lane with a worker and the shared cache."""

    def __init__(self, url: str | None, secret: bytes = SECRET, scope: str = "v1", purifier: str = "") -> None:
        self.events: Counter[str] = Counter()
        self.purifier = load(purifier) if purifier else CountedInvert()
        self.lane = Lane(Worker(self.purifier, WorkerOptions(secret=secret)), LaneOptions(workers=1, cache_bytes=0))
        if url is not None:
            self.lane.shared = SharedCache(url, secret, scope)
            self.lane.shared.on_event = lambda event: self.events.update([event])

    async def purify(self, data: bytes, client: str = "") -> Purified:
        return await self.lane(Job(data, pixels=12 * 16), digest_of(data), client)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with redis_server(tmp_path_factory.mktemp("redis")) as (url, _):
        yield url


@pytest.fixture
def url(server: str) -> str:
    client = redis.Redis.from_url(server)
    client.flushall()
    client.close()
    return server


def test_an_image_is_purified_by_one_replica_only(url: str) -> None:
    async def work() -> None:
        one, two = Replica(url), Replica(url)
        first, second = await one.purify(png()), await two.purify(png())
        assert first.image == second.image
        assert (one.purifier.calls, two.purifier.calls) == (1, 0)
        assert second.cached
        assert (first.score, first.digest) == (second.score, second.digest)
        assert (one.events, two.events) == (Counter(miss=1), Counter(hit=1))

    run(work())


def test_clients_options_and_secrets_share_nothing(url: str) -> None:
    async def work() -> None:
        await Replica(url).purify(png(), "client a")
        for other, client in (
            (Replica(url), "client b"),
            (Replica(url, scope="v2"), "client a"),
            (Replica(url, secret=b"another secret of others"), "client a"),
        ):
            assert not (await other.purify(png(), client)).cached

    run(work())


def test_draws_of_one_image_are_entries_of_their_own() -> None:
    cache = SharedCache("redis://127.0.0.1:1", SECRET, "v1")
    assert cache._key("", Job(png())) != cache._key("", Job(png(), turn=1)), "votes need different noise"
    cache.close()


def test_a_forged_entry_is_a_miss(url: str) -> None:
    async def work() -> None:
        honest = await Replica(url).purify(png())
        client = redis.Redis.from_url(url)
        (key,) = client.keys("*")
        for forged in (b"", b"x" * 500, client.get(key)[:-1], b"\0" * 32 + client.get(key)[32:]):
            client.set(key, forged)
            replica = Replica(url)
            assert (await replica.purify(png())).image == honest.image
            assert (replica.purifier.calls, replica.events) == (1, Counter(forged=1))
        client.close()

    run(work())


def test_a_cache_killed_in_mid_load_loses_nothing(tmp_path: Path) -> None:
    async def work() -> None:
        with redis_server(tmp_path) as (address, process):
            one, two, alone = Replica(address), Replica(address), Replica(None)
            for index in range(40):
                if index == 20:
                    process.kill()
                    process.wait()
                data = png(index)
                results = [await replica.purify(data) for replica in (one, two, alone)]
                assert results[0].image == results[1].image == results[2].image
            assert two.events["hit"] == 20
            assert two.events["error"] >= 1

    run(work())


@pytest.mark.parametrize("images", [5, pytest.param(1000, marks=pytest.mark.slow)])
def test_replicas_with_one_secret_give_the_same_bytes_without_a_cache(images: int) -> None:
    async def work() -> None:
        replicas = [Replica(None, purifier="bridge:sigma=0.1") for _ in range(2)]
        for index in range(images):
            results = [await replica.purify(png(index)) for replica in replicas]
            assert results[0].image == results[1].image

    run(work(), seconds=200)


def test_a_cache_without_a_secret_or_with_a_bad_address_is_one_line() -> None:
    with pytest.raises(CodefendError, match="cache_url needs noise_secret"):
        load_settings(upstream="http://localhost:1/v1", cache_url="redis://localhost")
    settings = load_settings(upstream="http://localhost:1/v1", cache_url="localhost:6379", noise_secret="s" * 16)
    with pytest.raises(CodefendError, match="cache_url: Redis URL must"):
        create_app(settings, purifier=Invert())


def test_the_gateway_counts_what_the_cache_answers(url: str) -> None:
    settings = load_settings(upstream="http://localhost:1/v1", cache_url=url, noise_secret="s" * 16)
    app = create_app(settings, purifier=Invert())
    engine = app.state.engine

    async def work() -> None:
        await engine.purify_file(png(), engine.terms, _caller())
        await asyncio.sleep(0)
        assert b'codefend_shared_cache_total{result="miss"} 1.0' in app.state.meters.text()

    run(work())
    assert "redis://" not in repr(settings)


def _caller():  # type: ignore[no-untyped-def]
    from codefend.gateway.engine import Caller

    return Caller()
