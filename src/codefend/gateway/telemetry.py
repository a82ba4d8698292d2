"""Metrics, traces and logs. None of them ever holds a header, a key, a query string or a byte of an image."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from codefend.types import CodefendError

if TYPE_CHECKING:
    from codefend.gateway.worker import Purified

log = logging.getLogger("codefend.gateway")

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


_SCORES = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)


class Meters:
    """The gateway's own registry: two apps in one process don't collide."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        if os.path.isdir("/proc/self"):
            ProcessCollector(registry=self.registry)  # memory, CPU, open files of the gateway's own process
        counter, histogram = self._counter, self._histogram
        self.requests = counter("requests", "Requests answered", "route", "status")
        self.seconds = histogram("request_seconds", "Until the end of the answer", _SECONDS, "route")
        self.images = counter("images", "Images by what was done: purified, cached, reencoded", "result")
        self.shared_cache = counter("shared_cache", "Images looked up: hit, miss, forged, error", "result")
        self.scores = histogram("score", "Detection scores of images", _SCORES)
        self.instructions = counter("image_instructions", "Lines of text in images that read like instructions")
        self.bypass = counter("bypass", "Images that went on without the purifier because it failed", "reason")
        self.refused = counter("refused", "Requests refused by the gateway itself", "code")
        self.upstream_errors = counter("upstream_errors", "Failed exchanges with the upstream", "kind")
        self.upstream_retries = counter("upstream_retries", "Requests sent to the upstream again", "kind")
        self.disconnects = counter("disconnects", "Clients that left before their answer was complete")
        self.restarts = counter("worker_restarts", "Workers replaced: dead, frozen, crashed, timeout", "reason")
        self.batches = histogram("batch_images", "Images per batch", (1, 2, 4, 8, 16, 32))
        self.purify_seconds = histogram("purify_seconds", "One batch: decode, purify, encode", _SECONDS)
        self.in_flight = Gauge("codefend_in_flight", "Requests being answered", registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"codefend_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"codefend_{name}", text, labels, buckets=buckets, registry=self.registry)

    def gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Add a gauge that is read when the metrics are."""
        Gauge(f"codefend_{name}", text, registry=self.registry).set_function(value)

    def build_info(self, **facts: str) -> None:
        """Add the gauge ``codefend_build_info``, which is 1 and whose labels are ``facts``."""
        Gauge("codefend_build_info", "What runs here", list(facts), registry=self.registry).labels(**facts).set(1)

    def batch(self, images: int, seconds: float) -> None:
        self.batches.observe(images)
        self.purify_seconds.observe(seconds)

    def image(self, image: Purified) -> None:
        """Count an image by what was done, its score unless that was counted before, and its instructions."""
        self.images.labels("cached" if image.cached else "purified" if image.purified else "reencoded").inc()
        if image.score is not None and not image.cached:
            self.scores.observe(image.score)
        self.instructions.inc(len(image.texts or ()))

    def bypassed(self, reason: str) -> None:
        self.bypass.labels(reason).inc()
        log.critical("image forwarded without purification", extra={"fields": {"reason": reason}})

    def restarted(self, reason: str) -> None:
        self.restarts.labels(reason).inc()
        log.warning("worker replaced", extra={"fields": {"reason": reason}})

    def text(self) -> bytes:
        return generate_latest(self.registry)


class JsonFormatter(logging.Formatter):
    """One JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= getattr(record, "fields", {})
        if record.exc_info and record.exc_info[0] is not None:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure_logging(level: str) -> None:
    """Send the logs of the gateway and its server to standard error as JSON."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    for name in ("codefend", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level.upper())


def configure_tracing() -> None:
    """Send traces where OpenTelemetry's own variables say, unless its SDK is set up already.

    Raises CodefendError as `tracer_provider` does.
    """
    with suppress(ModuleNotFoundError):
        if type(import_module("opentelemetry.trace").get_tracer_provider()).__name__ != "ProxyTracerProvider":
            return  # set up by `opentelemetry-instrument`
    provider = tracer_provider()
    if provider is not None:
        import_module("opentelemetry.trace").set_tracer_provider(provider)


def tracer_provider() -> Any:
    """The provider that OpenTelemetry's own variables describe, or None.

    ``OTEL_TRACES_EXPORTER`` is ``console``, ``otlp`` or ``none``; an ``OTEL_EXPORTER_OTLP_*ENDPOINT`` alone means otlp.
    Raises CodefendError when what they ask for is not installed.
    """
    endpoints = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    default = "otlp" if any(os.environ.get(name) for name in endpoints) else "none"
    kind = os.environ.get("OTEL_TRACES_EXPORTER") or default
    if kind == "none" or os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    if kind not in _EXPORTERS:
        raise CodefendError(f"OTEL_TRACES_EXPORTER={kind} is not known here; choose {', '.join(_EXPORTERS)} or none")
    module, name, package = _EXPORTERS[kind]
    try:
        sdk = import_module("opentelemetry.sdk.trace")
        export, resources = (
            import_module("opentelemetry.sdk.trace.export"),
            import_module("opentelemetry.sdk.resources"),
        )
        exporter = getattr(import_module(module), name)()
    except ModuleNotFoundError as error:
        raise CodefendError(f"traces by {kind} need another package: pip install {package}") from error
    named = {"service.name": os.environ.get("OTEL_SERVICE_NAME") or "codefend"}
    provider = sdk.TracerProvider(resource=resources.Resource.create(named))
    provider.add_span_processor(export.BatchSpanProcessor(exporter))
    return provider


_EXPORTERS = {  # module, class, package
    "console": ("opentelemetry.sdk.trace.export", "ConsoleSpanExporter", "opentelemetry-sdk"),
    "otlp": (
        "opentelemetry.exporter.otlp.proto.http.trace_exporter",
        "OTLPSpanExporter",
        "opentelemetry-sdk opentelemetry-exporter-otlp-proto-http",
    ),
}


class Tracer:
    """OpenTelemetry spans where its API is installed, nothing where it isn't."""

    def __init__(self, provider: Any = None) -> None:
        self._tracer: Any = None
        try:
            self._trace: Any = import_module("opentelemetry.trace")
            self._propagate: Any = import_module("opentelemetry.propagate")
        except ModuleNotFoundError:
            return
        provider = provider or self._trace.get_tracer_provider()
        if type(provider).__name__ not in ("ProxyTracerProvider", "NoOpTracerProvider"):  # an SDK is configured
            self._tracer = provider.get_tracer("codefend.gateway")

    @contextmanager
    def span(self, name: str, headers: dict[str, str] | None, **attributes: Any) -> Iterator[dict[str, str]]:
        """Open a span and yield the headers that carry it on.

        Its parent is the ``traceparent`` in the caller's ``headers``, or without them the current span.
        """
        if self._tracer is None:
            yield {}
            return
        parent = None if headers is None else self._propagate.extract(headers)
        with self._tracer.start_as_current_span(name, context=parent, attributes=attributes):
            onward: dict[str, str] = {}
            self._propagate.inject(onward)
            yield onward

    def note(self, **attributes: str | int) -> None:
        """Add attributes to the current span, those that are not empty."""
        if self._tracer is not None:
            self._trace.get_current_span().set_attributes({name: value for name, value in attributes.items() if value})
