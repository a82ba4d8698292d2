"""Options of the gateway's parts, with their defaults. `config.Settings` takes the defaults from here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Mode = Literal["purify", "detect", "block"]
Encoding = Literal["auto", "png", "jpeg", "webp"]
OnError = Literal["block", "fallback", "pass"]
Scores = Literal["hide", "round", "exact"]
GuardrailName = Literal["litellm", "portkey", "aperture"]
ClientLog = Literal["none", "masked", "full"]


@dataclass(frozen=True)
class Limits:
    """What a request may hold."""

    max_body_bytes: int = 64 << 20
    max_image_bytes: int = 20 << 20
    max_pixels: int = 64_000_000  # of one image, as it arrives
    max_ratio: float = 100.0  # longer side / shorter side
    max_images: int = 20  # of one request
    first_frame: bool = False  # use the first frame of an animation instead of refusing it
    all_frames: bool = False  # send an animation on as one, every frame purified
    document_side: int = 1280  # longer side of a document's page, pixels
    max_side: int = 2048  # larger images are shrunk to this longer side before anything else; 0: never


@dataclass(frozen=True)
class AccessOptions:
    hosts: tuple[str, ...] = ()  # accepted Host headers, without port; empty: all
    requests_per_minute: int = 0  # of one key; 0: unlimited
    requests_per_day: int = 0
    log_client: ClientLog = "masked"


@dataclass(frozen=True)
class BudgetOptions:
    """Memory for request bodies."""

    total: int = 256 << 20  # bytes of all requests that are being read, purified or sent on
    client: int = 128 << 20  # of it, for one key or, without keys, for one address


@dataclass(frozen=True)
class FetchOptions:
    """Remote images."""

    allowed: bool = False
    hosts: tuple[str, ...] = ()  # when not empty, only these and their subdomains
    timeout_s: float = 10.0  # for everything, redirects included
    max_redirects: int = 3
    concurrent: int = 8  # fetches at a time; half of them for one client


@dataclass(frozen=True)
class LaneOptions:
    """The queue in front of the workers."""

    queue_images: int = 64
    queue_pixels: int = 0  # that may wait; 0: as many as can be purified before the deadline
    batch_images: int = 8
    batch_pixels: int = 1_000_000  # sent to a worker or decoded at a time; one image may have more
    workers: int = 2  # one decodes and encodes while the other is in the purifier
    torch_threads: int = 0  # per operation of workers in this process; 0 leaves PyTorch's own choice
    timeout_s: float = 30.0  # for one image, queue included
    cache_bytes: int = 256 << 20
    max_side: int = 0  # to which the workers shrink images first; 0: never


@dataclass(frozen=True)
class PoolOptions:
    """Worker processes."""

    workers: int = 2
    torch_threads: int = 0  # in one process; 0 shares the cores out
    timeout_s: float = 30.0  # for one image; a process that takes longer is ended and replaced


@dataclass(frozen=True)
class UpstreamOptions:
    """Connections to the server behind the gateway."""

    connect_timeout_s: float = 5.0
    upstream_timeout_s: float = 600.0  # between two pieces of an answer
    upstream_retries: int = 2
    breaker_failures: int = 0  # in a row, from which requests are refused for a while; 0: never
    breaker_s: float = 10.0
