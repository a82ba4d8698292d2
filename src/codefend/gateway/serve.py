"""Run the gateway until it is told to stop."""

from __future__ import annotations

import gc
import socket
import sys
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from codefend.gateway.app import create_app
from codefend.gateway.config import Settings
from codefend.gateway.telemetry import configure_logging, configure_tracing, log
from codefend.types import CodefendError


class _Server(uvicorn.Server):
    """Turns unready at the first signal, finishes running requests, then returns instead of dying of the signal."""

    def __init__(self, config: uvicorn.Config, app: Starlette) -> None:
        super().__init__(config)
        self._app = app

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._app.state.ready = False
        self.force_exit = self.should_exit  # a second signal does not wait
        self.should_exit = True


def serve(settings: Settings) -> int:
    """Serve until SIGINT or SIGTERM; 0 after a clean stop. Raises CodefendError for what is wrong before the start."""
    configure_logging(settings.log_level)
    configure_tracing()
    listener = _listen(settings.host, settings.port)
    with listener:
        named = {"upstream": settings.upstream, "purifier": settings.purifier}
        log.info("starting", extra={"fields": named})  # loading a model can take its time
        app = create_app(settings)
        keep_loop_free()
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=False,
            lifespan="on",
            ws="none",
            timeout_graceful_shutdown=round(settings.drain_s),
            timeout_keep_alive=75,
        )
        server = _Server(config, app)
        host, port = listener.getsockname()[:2]
        log.info("listening", extra={"fields": {"url": f"http://{host}:{port}", **named}})
        if settings.on_error != "block":
            log.warning(
                "images may pass unpurified when the purifier fails", extra={"fields": {"on_error": settings.on_error}}
            )
        if not settings.api_keys and host not in ("127.0.0.1", "::1"):
            log.warning("no keys are set: everyone who reaches this address may use it")
        server.run(sockets=[listener])
    return 0 if server.started else 1


def keep_loop_free() -> None:
    """What else can hold up an event loop: threads that keep the interpreter, and a collector that looks at it all."""
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
