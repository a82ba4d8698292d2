"""The application: what the settings name is built and checked here, before the first request."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from importlib import resources
from typing import TYPE_CHECKING, Any

import httpx2
import torch
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Mount, Route

from codefend import __version__, purifiers
from codefend.core import documents
from codefend.gateway.access import Access, Keys, client_fields
from codefend.gateway.budget import BodyBudget
from codefend.gateway.config import EMBEDDED, NO_UPSTREAM, Settings, is_embedded, model_name
from codefend.gateway.engine import Engine, Terms
from codefend.gateway.errors import error_body
from codefend.gateway.fetch import Fetcher, Resolve, resolve
from codefend.gateway.guardrails import FORMS, Guardrail
from codefend.gateway.lane import Lane
from codefend.gateway.options import (
    AccessOptions,
    BudgetOptions,
    FetchOptions,
    LaneOptions,
    Limits,
    PoolOptions,
    UpstreamOptions,
)
from codefend.gateway.page import Page
from codefend.gateway.pool import Pool
from codefend.gateway.proxy import Proxy
from codefend.gateway.shapes import Inspection
from codefend.gateway.shared_cache import SharedCache
from codefend.gateway.telemetry import Meters, log
from codefend.gateway.upstream import Upstream, connect
from codefend.gateway.worker import Runner, Worker, WorkerOptions
from codefend.prompts import TextPolicy, load_any
from codefend.purifiers.base import Purifier
from codefend.types import CodefendError

if TYPE_CHECKING:
    from codefend.gateway.pocket import Showcase
    from codefend.prompts.folders import AnyPolicy

_PAGE_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
_PAGE_POLICY += "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


def create_app(
    settings: Settings,
    *,
    purifier: Purifier | None = None,
    transport: httpx2.AsyncBaseTransport | None = None,
    fetch_transport: httpx2.AsyncBaseTransport | None = None,
    resolver: Resolve = resolve,
    showcase: Showcase | None = None,
) -> Starlette:
    """Build the gateway. ``purifier`` and the transports replace what the settings name: for tests and embedding.

    ``showcase`` lets the page show samples and attack images. ``app.state.reload(settings)`` takes over keys, policy
    and routes of other settings. Raises CodefendError for an unknown purifier or prompt policy, and as
    ``Terms.choose`` does.
    """
    prompt = load_any(settings.prompt)
    engine = build_engine(settings, purifier=purifier, prompt=prompt)
    lane = build_lane(settings, engine.worker)
    meters, keys = Meters(), Keys(_keys(settings))
    engine.lane, lane.shared = lane, _shared_cache(settings, engine, meters)
    options = settings.part(FetchOptions, **_fetch_options(settings))
    fetcher = Fetcher(options, max_bytes=settings.max_image_bytes, transport=fetch_transport, resolver=resolver)
    engine.fetch = fetcher
    budget = BodyBudget(_budget_options(settings))
    upstream = _upstream(settings, transport, prompt, meters, showcase)
    proxy = Proxy(engine, settings, meters, upstream, budget)
    _observe(meters, engine, lane, fetcher, budget, settings)
    demo = settings.with_demo and isinstance(prompt, TextPolicy)  # a soft prefix is in the model: none is undefended
    name = model_name(settings.upstream) if is_embedded(settings.upstream) else None
    page = Page(proxy, demo=demo, model=name, showcase=settings.upstream in EMBEDDED and showcase is not None)
    app = Starlette(
        routes=[*_routes(proxy, page), *_operations(meters, lane)],
        exception_handlers={HTTPException: partial(_plain_error, meters)},
        middleware=_middleware(settings, keys, meters),
        lifespan=_lifespan(engine, lane, settings.drain_s, (upstream, fetcher)),
    )
    app.router.redirect_slashes = False
    app.state.ready, app.state.engine, app.state.meters, app.state.lane = False, engine, meters, lane
    app.state.reload = partial(_reload, keys, proxy)
    return app


def _routes(proxy: Proxy, page: Page) -> list[BaseRoute]:
    """The guardrails, the proxy and its page, as the settings say. Raises CodefendError for nothing to serve."""
    settings = proxy.settings
    guardrails = (
        Guardrail(FORMS[name], proxy.engine, settings, proxy.meters, proxy.budget) for name in settings.guardrails
    )
    routes: list[BaseRoute] = [Route(guardrail.form.path, guardrail, methods=["POST"]) for guardrail in guardrails]
    if settings.upstream != NO_UPSTREAM:
        routes += [Mount("/v1", app=proxy), *(_page(page) if settings.page else [])]
    elif not routes:
        raise CodefendError("nothing to serve: give --upstream or --guardrails")
    return routes


def _reload(keys: Keys, proxy: Proxy, settings: Settings) -> None:
    """Take over what can change while requests run. Raises CodefendError as ``Terms.choose`` does."""
    terms = Terms.choose(proxy.engine.worker, settings.policy, settings.threshold, settings.text)
    proxy.engine.inspection = _inspection(settings)
    keys.replace(_keys(settings))
    proxy.upstream.key = _upstream_key(settings)
    proxy.engine.terms = terms
    proxy.configure(settings)


def _inspection(settings: Settings) -> Inspection:
    """Raises CodefendError when documents are wanted and their package is missing."""
    if settings.documents == "pages":
        documents.require()
    return Inspection(settings.allow_image_links, settings.allow_tools, settings.documents)


def _keys(settings: Settings) -> list[str]:
    return [key.get_secret_value() for key in settings.api_keys]


def _upstream_key(settings: Settings) -> str | None:
    return None if settings.upstream_api_key is None else settings.upstream_api_key.get_secret_value()


def _middleware(settings: Settings, keys: Keys, meters: Meters) -> list[Middleware]:
    access = Middleware(
        Access,
        keys=keys,
        options=settings.part(AccessOptions, hosts=settings.allowed_hosts),
        meters=meters,
        verdicts={FORMS[name].path: FORMS[name].block for name in settings.guardrails},
    )
    if not settings.cors_origins:
        return [access]
    ours = ["x-codefend-request-id", "x-codefend-status", "x-request-id", "retry-after"]
    cors = Middleware(
        CORSMiddleware,
        allow_origins=settings.cors_origins,
        allow_methods=["GET", "POST", "DELETE"],
        allow_headers=["*"],
        expose_headers=ours,
    )
    return [cors, access]


def _lifespan(
    engine: Engine, lane: Lane, drain_s: float, connections: Sequence[Upstream | Fetcher]
) -> Callable[[Starlette], AbstractAsyncContextManager[None]]:
    """Ready when the models are warm; at the end what is queued is finished before anything is closed."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        runners = [engine.worker] if engine.fallback is None else [engine.worker, engine.fallback]
        for runner in runners:
            await asyncio.to_thread(runner.warm_up)
        _log_capacity(lane)
        app.state.ready = True
        try:
            yield
        finally:
            app.state.ready = False
            await lane.close(drain_s)
            for connection in connections:
                await connection.aclose()
            engine.close()
            if lane.shared is not None:
                lane.shared.close()
            for runner in runners:
                runner.close()

    return lifespan


def _log_capacity(lane: Lane) -> None:
    """Say what was measured, and what follows from it."""
    rate, options = lane.worker.seconds_per_pixel, lane.options
    if rate:
        fields = {
            "seconds_per_megapixel": round(rate * 1e6, 2),
            "largest_image_megapixels": round(options.timeout_s / rate / 1e6, 1),
            "megapixels_in_time": round(options.timeout_s * options.workers / rate / 1e6, 1),
        }
        log.info("capacity", extra={"fields": fields})


def build_engine(settings: Settings, *, purifier: Purifier | None = None, prompt: AnyPolicy | None = None) -> Engine:
    """The engine without its lane. Raises CodefendError as ``create_app`` does."""
    limits = settings.part(Limits)
    given = settings.noise_secret
    secret = secrets.token_bytes(32) if given is None else given.get_secret_value().encode()
    options = settings.part(WorkerOptions, limits=limits, secret=secret)

    def runner(name: str, purifier: Purifier | None, isolate: bool) -> Runner:
        build = partial(build_worker, name, options)
        local = build(purifier)
        if settings.votes > 1 and name == settings.purifier and not local.purifier.stochastic:
            raise CodefendError(
                f"votes={settings.votes}: purifier {local.name} adds no noise, so all answers are the same"
            )
        if not isolate:
            return local
        pool_options = settings.part(PoolOptions, timeout_s=settings.purify_timeout_s)
        pool = Pool(build, pool_options, name=local.name, threshold=local.threshold)
        pool.weights = local.weights
        return pool

    isolate = settings.isolate and purifier is None  # an object given here cannot go to another process
    main = runner(settings.purifier, purifier, isolate)
    return Engine(
        main,
        limits=limits,
        terms=Terms.choose(main, settings.policy, settings.threshold, settings.text),
        policy=_text_policy(prompt or load_any(settings.prompt), settings),
        everywhere=settings.prompt_everywhere,
        on_error=settings.on_error,
        inspection=_inspection(settings),
        fallback=runner(settings.fallback, None, isolate) if settings.on_error == "fallback" else None,
    )


def _text_policy(prompt: AnyPolicy, settings: Settings) -> TextPolicy | None:
    """The policy that is written into requests. Raises CodefendError for a soft prefix in front of a server."""
    if isinstance(prompt, TextPolicy):
        return None if prompt.empty else prompt
    if not is_embedded(settings.upstream):
        raise CodefendError(
            f"{prompt.name!r} is a soft prefix: it works in front of an embedded model, not of a server"
        )
    return None


def build_worker(name: str, options: WorkerOptions, purifier: Purifier | None = None) -> Worker:
    """A worker around ``purifier``, or the one of that name. Raises CodefendError for an unknown name."""
    return Worker(purifier or purifiers.load(name), options)


def build_lane(settings: Settings, worker: Runner) -> Lane:
    """The queue in front of ``worker``."""
    options = settings.part(
        LaneOptions,
        torch_threads=0 if settings.isolate else settings.torch_threads,
        timeout_s=settings.purify_timeout_s,
        cache_bytes=settings.cache_mb << 20,
    )
    return Lane(worker, options)


def _shared_cache(settings: Settings, engine: Engine, meters: Meters) -> SharedCache | None:
    """The cache of all replicas. Raises CodefendError for a missing package and an address that is none."""
    if settings.cache_url is None or settings.noise_secret is None:
        return None
    facts = (__version__, engine.worker.name, engine.worker.weights, settings.part(Limits), settings.encoding)
    secret, url = settings.noise_secret.get_secret_value().encode(), settings.cache_url.get_secret_value()
    shared = SharedCache(url, secret, repr(facts), ttl_s=settings.cache_ttl_s)
    shared.on_event = lambda event: meters.shared_cache.labels(event).inc()
    return shared


def _fetch_options(settings: Settings) -> dict[str, Any]:
    return {
        "allowed": settings.allow_remote_images,
        "hosts": settings.remote_hosts,
        "timeout_s": settings.fetch_timeout_s,
        "concurrent": settings.max_fetches,
    }


def _budget_options(settings: Settings) -> BudgetOptions:
    """Any one body that the limits allow fits."""
    total = max(settings.max_buffer_bytes, settings.max_body_bytes)
    return BudgetOptions(total, max(total // 2, settings.max_body_bytes))


def _upstream(
    settings: Settings,
    transport: httpx2.AsyncBaseTransport | None,
    prompt: AnyPolicy,
    meters: Meters,
    showcase: Showcase | None,
) -> Upstream:
    base_url = settings.upstream if settings.upstream != NO_UPSTREAM else "http://none.invalid"
    if is_embedded(settings.upstream):
        from codefend.gateway.pocket import pocket_transport

        base_url = "http://pocket/v1"
        transport = transport or pocket_transport(name=settings.upstream, policy=prompt, showcase=showcase)
    return Upstream(
        transport or connect(settings.upstream_ca, settings.upstream_proxy),
        base_url,
        meters,
        settings.part(UpstreamOptions),
        key=_upstream_key(settings),
    )


def _observe(
    meters: Meters, engine: Engine, lane: Lane, fetcher: Fetcher, budget: BodyBudget, settings: Settings
) -> None:
    """Let the meters see the parts."""
    worker = engine.worker
    lane.on_batch, engine.on_bypass, engine.on_image = meters.batch, meters.bypassed, meters.image
    meters.build_info(version=__version__, torch=torch.__version__, purifier=worker.name, policy=settings.policy)
    meters.gauge("queue_images", "Images that wait for the purifier", lambda: lane.depth)
    meters.gauge("pixels_in_flight", "Pixels of images that wait or are purified, after shrinking", lambda: lane.pixels)
    meters.gauge("cache_bytes", "Purified images in the cache", lambda: lane.cached_bytes)
    meters.gauge("body_bytes", "Request bodies in memory", lambda: budget.used)
    meters.gauge("fetches_in_flight", "Remote images being fetched", lambda: fetcher.in_flight)
    if isinstance(worker, Pool):
        worker.on_restart = meters.restarted
        meters.gauge("workers_answering", "Workers that answered the last ping", lambda: worker.answering)


def _operations(meters: Meters, lane: Lane) -> list[BaseRoute]:
    def problem(app: Any) -> str:
        if not app.state.ready:
            return "draining or starting"
        if isinstance(lane.worker, Pool) and not lane.worker.answering:
            return "no worker answers"
        return "queue full" if lane.full else ""

    async def healthz(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def readyz(request: Request) -> Response:
        status = problem(request.app)
        return JSONResponse({"status": status or "ready"}, status_code=503 if status else 200)

    async def metrics(request: Request) -> Response:
        return Response(await asyncio.to_thread(meters.text), media_type="text/plain; version=0.0.4")

    return [Route("/healthz", healthz), Route("/readyz", readyz), Route("/metrics", metrics)]


def _page(page: Page) -> list[BaseRoute]:
    html = resources.files("codefend.gateway").joinpath("page.html").read_bytes()
    headers = {"content-security-policy": _PAGE_POLICY, "x-content-type-options": "nosniff"}

    async def index(request: Request) -> Response:
        return Response(html, media_type="text/html; charset=utf-8", headers=headers)

    return [
        Route("/", index),
        Route("/page/info", page.info),
        Route("/page/purify", page.purify, methods=["POST"]),
        Route("/page/undefended", page.undefended, methods=["POST"]),
        Route("/page/sample", page.sample, methods=["POST"]),
        Route("/page/attack", page.attack, methods=["POST"]),
    ]


async def _plain_error(meters: Meters, request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    code = {404: "not_found", 405: "method_not_allowed"}.get(status, "error")
    meters.refused.labels(code).inc()
    path = request.url.path[:100]
    log.info("request", extra={"fields": {"path": path, "status": status, "code": code} | client_fields(request.scope)})
    body = error_body("other", status, code, f"{request.method} {path}: {code.replace('_', ' ')}")
    return Response(body, status_code=status, media_type="application/json")
