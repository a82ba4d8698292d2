"""``codefend mcp-proxy``: a proxy between an MCP client and a server that purifies every image the server sends.

`messages` finds and replaces the images of a JSON-RPC message, `upstream` speaks with servers (a command's standard
streams, or a streamable HTTP address), `client` with the client over this process's own, and `proxy` passes messages
on and answers what it refuses.
"""

from __future__ import annotations

import asyncio

from codefend.gateway.app import build_engine, build_lane
from codefend.gateway.config import Settings
from codefend.gateway.engine import Engine
from codefend.gateway.upstream import connect
from codefend.integrations.mcp.client import StandardStreams
from codefend.integrations.mcp.messages import Documents
from codefend.integrations.mcp.proxy import Proxy
from codefend.integrations.mcp.upstream import CommandServer, HttpServer, Upstream


def serve(settings: Settings, target: str | list[str], documents: Documents = "refuse") -> int:
    """Stand between standard input and output and an MCP server, a URL or a command, until one of them ends.

    Returns 0 when the client has closed its end and 1 when the server has ended. Raises CodefendError for a purifier
    or a command that cannot be started.
    """
    engine = build_engine(settings)
    engine.lane = build_lane(settings, engine.worker)
    server: Upstream
    if isinstance(target, str):
        key = settings.upstream_api_key
        transport = connect(settings.upstream_ca, settings.upstream_proxy)
        server = HttpServer(target, settings.max_body_bytes, transport, key.get_secret_value() if key else "")
    else:
        server = CommandServer(target, settings.max_body_bytes)
    return asyncio.run(_serve(engine, server, settings.max_body_bytes, documents))


async def _serve(engine: Engine, upstream: Upstream, max_bytes: int, documents: Documents) -> int:
    """Answer at once, while the workers start: only images wait for them."""
    ready = asyncio.ensure_future(asyncio.to_thread(engine.worker.warm_up))
    ready.add_done_callback(lambda done: done.cancelled() or done.exception())
    try:
        async with upstream as server:
            return await Proxy(StandardStreams(max_bytes), server, engine, ready, documents).run()
    finally:
        engine.worker.close()
        engine.close()
        ready.cancel()
