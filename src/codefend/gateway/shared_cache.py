"""Purified images that replicas share through Redis: saves work; its content is authenticated.

Keys are HMACs of everything that decides the result, the client included: no client learns from the time of an answer
that another has sent the same image. Each entry carries an HMAC of its key and content under the replicas' noise
secret, so whoever can write to Redis, but does not know the secret, can only cause misses. A failure counts as a
miss: the image is purified locally.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from codefend.core.assets import needs
from codefend.gateway.rewrite import EncodedImage
from codefend.gateway.worker import Job, Purified
from codefend.types import CodefendError

_TIMEOUT_S = 0.25  # for Redis to answer: purifying a small image takes about as long
_PAUSE_S = 5.0  # without Redis after a failure
_MAX_BYTES = 16 << 20  # of an entry
_TAG = 32  # bytes of an entry's HMAC

log = logging.getLogger("codefend.gateway")


class SharedCache:
    """``scope`` names what decides a result besides image and client: weights, options and version. Thread-safe.

    ``on_event`` is told "hit", "miss", "forged" or "error" for each image. Raises CodefendError for a missing package
    and for an invalid address.
    """

    def __init__(self, url: str, secret: bytes, scope: str, *, ttl_s: int = 3600) -> None:
        with needs("cache_url", "redis"):
            import redis
            from redis.backoff import NoBackoff
            from redis.retry import Retry
        try:
            self._redis: Any = redis.Redis.from_url(
                url, socket_timeout=_TIMEOUT_S, socket_connect_timeout=_TIMEOUT_S, retry=Retry(NoBackoff(), 0)
            )
        except ValueError as error:
            raise CodefendError(f"cache_url: {error}") from error
        self._secret = hmac.new(secret, b"codefend shared cache", hashlib.sha256).digest()
        self._scope, self._ttl_s, self._failures = scope, ttl_s, (redis.RedisError, OSError)
        self._resume = 0.0
        self.on_event: Callable[[str], None] = lambda event: None

    def fetch(self, jobs: Sequence[tuple[str, Job]]) -> list[Purified | None]:
        """The results of images, given as client and job; None for what has to be purified."""
        keys = [self._key(client, job) for client, job in jobs]
        values = self._call(len(keys), lambda: self._redis.mget(keys)) or [None] * len(keys)
        return [self._open(key, value) for key, value in zip(keys, values, strict=True)]

    def store(self, results: Sequence[tuple[str, Job, Purified]]) -> None:
        """Offer results to the other replicas."""
        entries = {self._key(client, job): _pack(result) for client, job, result in results}
        entries = {key: self._tag(key, body) + body for key, body in entries.items() if len(body) <= _MAX_BYTES}

        def write() -> None:
            pipeline = self._redis.pipeline(transaction=False)
            for key, value in entries.items():
                pipeline.set(key, value, ex=self._ttl_s)
            pipeline.execute()

        if entries:
            self._call(0, write)

    def close(self) -> None:
        self._redis.close()

    def _call(self, images: int, work: Callable[[], Any]) -> Any:
        """The answer of Redis; None when it fails, and for a while after that."""
        if time.monotonic() < self._resume:
            return None
        try:
            return work()
        except self._failures as error:
            self._resume = time.monotonic() + _PAUSE_S
            for _ in range(images):
                self.on_event("error")
            log.warning("shared cache unavailable", extra={"fields": {"error": type(error).__name__}})
            return None

    def _key(self, client: str, job: Job) -> str:
        digest = hashlib.sha256(job.data).hexdigest()
        facts = json.dumps([self._scope, client, job.mode, job.threshold, job.turn, job.text, digest])
        return "codefend:" + hmac.new(self._secret, facts.encode(), hashlib.sha256).hexdigest()

    def _tag(self, key: str, body: bytes) -> bytes:
        return hmac.new(self._secret, key.encode() + b"\n" + body, hashlib.sha256).digest()

    def _open(self, key: str, value: bytes | None) -> Purified | None:
        if value is None:
            self.on_event("miss")
            return None
        if not hmac.compare_digest(value[:_TAG], self._tag(key, value[_TAG:])):
            self.on_event("forged")
            return None
        self.on_event("hit")
        return _unpack(value[_TAG:])


def _pack(result: Purified) -> bytes:
    head = {
        "type": result.image.media_type,
        "score": result.score,
        "purified": result.purified,
        "digest": result.digest,
        "texts": result.texts,
    }
    return json.dumps(head).encode() + b"\n" + result.image.data.encode("ascii")


def _unpack(body: bytes) -> Purified:
    line, _, data = body.partition(b"\n")
    head = json.loads(line)
    image = EncodedImage(head["type"], data.decode("ascii"))
    texts = None if head["texts"] is None else tuple(head["texts"])
    return Purified(image, head["score"], purified=head["purified"], cached=True, digest=head["digest"], texts=texts)
