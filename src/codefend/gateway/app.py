"""The application: what the settings name is built and checked here, before the first request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from importlib import resources
from typing import TYPE_CHECKING, Any

import httpx2
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Mount, Route

from codefend import purifiers
from codefend.gateway.auth import Auth
from codefend.gateway.config import Settings, embedded
from codefend.gateway.engine import Engine, Terms
from codefend.gateway.errors import error_body
from codefend.gateway.fetch import Fetcher, FetchOptions, Resolve, resolve
from codefend.gateway.lane import Lane, LaneOptions
from codefend.gateway.limits import Limits
from codefend.gateway.page import Page
from codefend.gateway.pool import Pool, PoolOptions
from codefend.gateway.proxy import Proxy
from codefend.gateway.telemetry import Meters
from codefend.gateway.worker import Runner, Worker
from codefend.prompts import TextPolicy, load_any
from codefend.purifiers.base import Purifier
from codefend.types import CodefendError

if TYPE_CHECKING:
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
) -> Starlette:
    """Build the gateway. ``purifier`` and the transports replace what the settings name: for tests and embedding.

    Raises CodefendError for an unknown purifier or prompt policy, and as ``Terms.choose`` does.
    """
    prompt = load_any(settings.prompt)
    engine = build_engine(settings, purifier=purifier, prompt=prompt)
    lane = Lane(engine.worker, _lane_options(settings))
    meters = Meters(depth=lambda: lane.depth)
    lane.on_batch, engine.on_bypass, engine.lane = meters.batch, meters.bypassed, lane
    fetcher = _fetcher(settings, fetch_transport, resolver)
    engine.fetch = fetcher
    upstream, base_url = _upstream(settings, transport, prompt)
    proxy = Proxy(engine, settings, meters, transport=upstream, base_url=base_url)
    demo = settings.with_demo and isinstance(prompt, TextPolicy)  # a soft prefix is in the model: none is undefended
    keys = [key.get_secret_value() for key in settings.api_keys]
    app = Starlette(
        routes=[Mount("/v1", app=proxy), *_operations(meters, lane), *_page(settings, engine, proxy, demo)],
        exception_handlers={HTTPException: _plain_error},
        middleware=[Middleware(Auth, keys=keys)],
        lifespan=_lifespan(engine, lane, settings.drain_s, (upstream, fetcher)),
    )
    app.router.redirect_slashes = False
    app.state.ready, app.state.engine, app.state.meters = False, engine, meters
    return app


def _lifespan(
    engine: Engine, lane: Lane, drain_s: float, connections: Sequence[httpx2.AsyncBaseTransport | Fetcher]
) -> Callable[[Starlette], AbstractAsyncContextManager[None]]:
    """Ready when the models are warm; at the end what is queued is finished before anything is closed."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        runners = [engine.worker] if engine.fallback is None else [engine.worker, engine.fallback]
        for runner in runners:
            await asyncio.to_thread(runner.warm_up)
        app.state.ready = True
        try:
            yield
        finally:
            app.state.ready = False
            await lane.close(drain_s)
            for connection in connections:
                await connection.aclose()
            engine.executor.shutdown(wait=False)
            for runner in runners:
                runner.close()

    return lifespan


def build_engine(settings: Settings, *, purifier: Purifier | None = None, prompt: AnyPolicy | None = None) -> Engine:
    """The engine without its lane. Raises CodefendError as ``create_app`` does."""
    limits = Limits(
        settings.max_body_bytes,
        settings.max_image_bytes,
        settings.max_pixels,
        settings.max_ratio,
        settings.max_images,
        settings.first_frame,
        settings.max_side,
    )

    def runner(name: str, given: Purifier | None = None) -> Runner:
        build = partial(
            build_worker,
            name,
            limits=limits,
            encoding=settings.encoding,
            device=settings.device,
            batch_pixels=settings.batch_pixels,
        )
        local = build(given)
        if purifier is not None or not settings.isolate:  # an object given here cannot go elsewhere
            return local
        options = PoolOptions(settings.workers, settings.torch_threads, settings.purify_timeout_s)
        return Pool(build, options, name=local.name, threshold=local.threshold)

    main = runner(settings.purifier, purifier)
    return Engine(
        main,
        limits=limits,
        terms=Terms.choose(main, settings.policy, settings.threshold),
        policy=_words(prompt or load_any(settings.prompt), settings),
        everywhere=settings.prompt_everywhere,
        on_error=settings.on_error,
        image_links=settings.allow_image_links,
        fallback=runner(settings.fallback) if settings.on_error == "fallback" else None,
    )


def _words(prompt: AnyPolicy, settings: Settings) -> TextPolicy | None:
    """What is written into requests; a soft prefix goes into the embedded model. Raises CodefendError for another one."""
    if isinstance(prompt, TextPolicy):
        return None if prompt.empty else prompt
    if settings.upstream != "pocket":
        raise CodefendError(
            f"{prompt.name!r} is a soft prefix: it works in front of the embedded pocket, not of a server"
        )
    return None


def build_worker(name: str, purifier: Purifier | None = None, **options: Any) -> Worker:
    """A worker around ``purifier``, or the one of that name. Raises CodefendError for an unknown name."""
    return Worker(purifier or purifiers.load(name), **options)


def _lane_options(settings: Settings) -> LaneOptions:
    return LaneOptions(
        queue_images=settings.queue_images,
        batch_images=settings.batch_images,
        threads=settings.workers,
        torch_threads=0 if settings.isolate else settings.torch_threads,
        timeout_s=settings.purify_timeout_s,
        cache_bytes=settings.cache_mb << 20,
    )


def _upstream(
    settings: Settings, transport: httpx2.AsyncBaseTransport | None, prompt: AnyPolicy
) -> tuple[httpx2.AsyncBaseTransport, str]:
    if embedded(settings.upstream):
        from codefend.gateway.pocket import pocket_transport

        return transport or pocket_transport(name=settings.upstream, policy=prompt), "http://pocket/v1"
    # The transport itself, not a client: no cookie jar, no redirects, no headers of its own.
    limits = httpx2.Limits(max_connections=1000, max_keepalive_connections=200, keepalive_expiry=30.0)
    return transport or httpx2.AsyncHTTPTransport(trust_env=False, limits=limits), settings.upstream


def _fetcher(settings: Settings, transport: httpx2.AsyncBaseTransport | None, resolver: Resolve) -> Fetcher:
    options = FetchOptions(
        settings.allow_remote_images, settings.remote_hosts, settings.fetch_timeout_s, settings.max_redirects
    )
    return Fetcher(options, max_bytes=settings.max_image_bytes, transport=transport, resolver=resolver)


def _operations(meters: Meters, lane: Lane) -> list[BaseRoute]:
    async def healthz(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def readyz(request: Request) -> Response:
        problem = "draining or starting" if not request.app.state.ready else "queue full" if lane.full else ""
        return JSONResponse({"status": problem or "ready"}, status_code=503 if problem else 200)

    async def metrics(request: Request) -> Response:
        return Response(meters.text(), media_type="text/plain; version=0.0.4")

    return [Route("/healthz", healthz), Route("/readyz", readyz), Route("/metrics", metrics)]


def _page(settings: Settings, engine: Engine, proxy: Proxy, demo: bool) -> list[BaseRoute]:
    if not settings.page:
        return []
    html = resources.files("codefend.gateway").joinpath("page.html").read_bytes()
    headers = {"content-security-policy": _PAGE_POLICY, "x-content-type-options": "nosniff"}

    async def index(request: Request) -> Response:
        return Response(html, media_type="text/html; charset=utf-8", headers=headers)

    page = Page(engine, proxy, demo=demo)
    return [
        Route("/", index),
        Route("/page/info", page.info),
        Route("/page/purify", page.purify, methods=["POST"]),
        Route("/page/undefended", page.undefended, methods=["POST"]),
        Route("/page/sample", page.sample, methods=["POST"]),
        Route("/page/attack", page.attack, methods=["POST"]),
    ]


async def _plain_error(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    code = {404: "not_found", 405: "method_not_allowed"}.get(status, "error")
    body = error_body("other", status, code, f"{request.method} {request.url.path[:100]}: {code.replace('_', ' ')}")
    return Response(body, status_code=status, media_type="application/json")
