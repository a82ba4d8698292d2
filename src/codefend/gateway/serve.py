"""Run the gateway until it is told to stop."""

from __future__ import annotations

import asyncio
import gc
import signal
import socket
import ssl
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

import h11
import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from codefend.gateway.access import LOOPBACK
from codefend.gateway.app import create_app
from codefend.gateway.config import EMBEDDED, Settings
from codefend.gateway.telemetry import configure_logging, configure_tracing, log
from codefend.types import CodefendError

if TYPE_CHECKING:
    from codefend.gateway.pocket import Showcase

HEADER_S = 20.0  # for the headers of a request to arrive, from the connection or their first byte on


class _Protocol(H11Protocol):
    """Closes connections on which the headers of a request do not arrive in time; uvicorn waits for ever."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._deadline = self.loop.call_later(HEADER_S, transport.close)

    def handle_events(self) -> None:
        super().handle_events()
        if self.conn.their_state is not h11.IDLE:
            self._cancel()
        elif self._deadline is None and self.conn.trailing_data[0]:
            self._deadline = self.loop.call_later(HEADER_S, self.transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel()
        super().connection_lost(exc)

    def _cancel(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


# How HTTP is read. h11 drops trailers, ignores upgrades and refuses what is ambiguous; httptools takes trailers for
# headers, and an offered upgrade (the default of Java's client) for the end of the request.
HTTP: dict[str, Any] = {
    "http": _Protocol,
    "ws": "none",
    "timeout_keep_alive": 75,
    "h11_max_incomplete_event_size": 1 << 16,
    "proxy_headers": False,  # by default uvicorn believes every local client's X-Forwarded-For
}


class _Server(uvicorn.Server):
    """Not ready from the first signal on; finishes running requests, then returns instead of dying of the signal."""

    def __init__(self, config: uvicorn.Config, app: Starlette, lame_duck_s: float) -> None:
        super().__init__(config)
        self._app, self._lame_duck_s = app, lame_duck_s

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self._app.state.ready or sig == signal.SIGINT or not self._lame_duck_s:
            self.force_exit = self.should_exit  # a second signal does not wait
            self.should_exit = True
        else:
            timer = threading.Timer(self._lame_duck_s, self._stop)
            timer.daemon = True
            timer.start()
        self._app.state.ready = False

    def _stop(self) -> None:
        self.should_exit = True


def serve(load: Callable[[], Settings], *, showcase: Callable[[], Showcase] | None = None) -> int:
    """Serve until SIGINT or SIGTERM; 0 after a clean stop.

    On SIGHUP keys, the upstream's among them, policy, routes and the certificate are loaded again.

    ``showcase`` is called for embedded pocket models only. Raises CodefendError for what is wrong before the start.
    """
    settings = load()
    configure_logging(settings.log_level)
    configure_tracing()
    listener = _listen(settings.host, settings.port)
    with listener:
        host, port = listener.getsockname()[:2]
        if not settings.allowed_hosts and host in LOOPBACK:
            settings = settings.model_copy(update={"allowed_hosts": (*LOOPBACK, settings.host)})
        scheme = "http" if settings.tls_cert is None else "https"
        named = {"upstream": settings.upstream.partition("?")[0], "purifier": settings.purifier}
        log.info("starting", extra={"fields": named})  # loading a model can take its time
        build = showcase if settings.upstream in EMBEDDED and settings.page else None
        app = create_app(settings, showcase=None if build is None else build())
        keep_loop_free()
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=False,
            lifespan="on",
            timeout_graceful_shutdown=round(settings.drain_s),
            **(HTTP | tls_options(settings) | proxy_options(settings)),
        )
        server = _Server(config, app, settings.lame_duck_s)
        log.info("listening", extra={"fields": {"url": f"{scheme}://{host}:{port}", **named}})
        _warn(settings, host)
        _reload_on_sighup(app, config, load)
        server.run(sockets=[listener])
    return 0 if server.started else 1


def _warn(settings: Settings, host: str) -> None:
    if settings.on_error != "block":
        fields = {"on_error": settings.on_error}
        log.warning("images may pass unpurified when the purifier is broken", extra={"fields": fields})
    if not settings.api_keys and host not in LOOPBACK:
        log.warning("no keys are set: everyone who reaches this address may use it")


def proxy_options(settings: Settings) -> dict[str, Any]:
    """Uvicorn's options for reverse proxies whose headers name the client, none without them."""
    if not settings.trusted_proxies:
        return {}
    return {"proxy_headers": True, "forwarded_allow_ips": list(settings.trusted_proxies)}


def tls_options(settings: Settings) -> dict[str, Any]:
    """Uvicorn's options for HTTPS, none without a certificate. Raises CodefendError for one that does not load."""
    if settings.tls_cert is None:
        return {}
    _load_chain(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), settings)
    return {"ssl_certfile": settings.tls_cert, "ssl_keyfile": settings.tls_key}


def _load_chain(context: ssl.SSLContext, settings: Settings) -> None:
    try:
        context.load_cert_chain(str(settings.tls_cert), settings.tls_key, password="")  # never ask for one
    except (OSError, ValueError) as error:
        raise CodefendError(f"cannot serve HTTPS with {settings.tls_cert} and {settings.tls_key}: {error}") from error


def _reload_on_sighup(app: Starlette, config: uvicorn.Config, load: Callable[[], Settings]) -> None:
    def reload(sig: int, frame: FrameType | None) -> None:
        try:
            settings = load()
            if settings.tls_cert is not None and config.ssl is not None:
                _load_chain(config.ssl, settings)  # for connections to come
            app.state.reload(settings)
        except CodefendError as error:
            log.error("settings not reloaded", extra={"fields": {"error": str(error)}})
        else:
            log.info("settings reloaded")

    if hasattr(signal, "SIGHUP") and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGHUP, reload)


def keep_loop_free() -> None:
    """Keep the event loop from waiting for threads that hold the interpreter, and for full garbage collections."""
    sys.setswitchinterval(0.001)  # seconds, in place of 5 ms
    gc.collect()
    gc.freeze()  # PyTorch alone makes a full collection of some 30 ms, and nothing loaded so far will be garbage


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise CodefendError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
    listener.set_inheritable(True)
    return listener
