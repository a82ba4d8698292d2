"""The servers behind the proxy: a command that speaks over its standard streams, or a streamable HTTP address."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol, Self

import httpx2

from codefend.types import CodefendError

# For a server to end by itself once its input is closed, and again once it is asked to; clients wait 2 s for the proxy.
GRACE_S = 0.8
_CHUNK = 1 << 16


class Upstream(Protocol):
    """An MCP server, running while the context is open. A message is one line of JSON, with its end.

    Opening it raises CodefendError where the server cannot be started.
    """

    async def __aenter__(self) -> Self: ...
    async def __aexit__(self, *error: object) -> None: ...

    async def send(self, line: bytes, message: Any) -> None:
        """Send a message; ``message`` is its parsed form. Raises OSError when the server is gone."""

    def lines(self) -> AsyncIterator[bytes | None]:
        """What the server sends, until it ends; None stands for a message over the limit, which is skipped."""


class CommandServer:
    """A server that this process starts, in a process group of its own. It inherits environment and error stream."""

    def __init__(self, command: Sequence[str], max_bytes: int) -> None:
        self.command, self.max_bytes = command, max_bytes

    async def __aenter__(self) -> Self:
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self.command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                start_new_session=os.name == "posix",
            )
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise CodefendError(
                f"cannot run {self.command[0]!r}: {reason}; give the server's command after --"
            ) from error
        return self

    async def send(self, line: bytes, message: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line)
        await self._process.stdin.drain()

    async def lines(self) -> AsyncIterator[bytes | None]:
        assert self._process.stdout is not None
        pieces: list[bytes] = []
        size = 0
        while chunk := await self._process.stdout.read(_CHUNK):
            *ends, rest = chunk.split(b"\n")
            for end in ends:
                size += len(end)
                yield b"".join([*pieces, end, b"\n"]) if size <= self.max_bytes else None
                pieces, size = [], 0
            size += len(rest)
            pieces = [*pieces, rest] if size <= self.max_bytes else []

    async def __aexit__(self, *error: object) -> None:
        """Close its input, then end it and whatever it has started, gently first."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        for end in (signal.SIGTERM, getattr(signal, "SIGKILL", signal.SIGTERM)):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), GRACE_S)
                break
            self._signal(end)
        await self._process.wait()
        self._signal(signal.SIGTERM)  # what it may have left behind

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.name == "posix":
                os.killpg(self._process.pid, number)
            else:
                self._process.send_signal(number)


class HttpServer:
    """A server at a streamable HTTP address, by the transport of the official SDK (the extra ``mcp``).

    ``transport`` carries the requests. A server that cannot be reached is an error of the request, not of the session.
    """

    def __init__(self, url: str, max_bytes: int, transport: httpx2.AsyncBaseTransport, key: str = "") -> None:
        self.url, self.max_bytes, self.key = url, max_bytes, key
        self._transport = _Guarded(transport, max_bytes)
        self._version = ""  # of the protocol, once it is negotiated
        self._mirrored: dict[str, Any] = {}  # tool -> its arguments that are repeated in headers

    async def __aenter__(self) -> Self:
        from mcp.client.streamable_http import streamable_http_client

        async with contextlib.AsyncExitStack() as stack:
            headers = {"authorization": f"Bearer {self.key}"} if self.key else {}
            timeout = httpx2.Timeout(30.0, read=300.0)
            client = httpx2.AsyncClient(transport=self._transport, headers=headers, timeout=timeout)
            await stack.enter_async_context(client)
            opened = streamable_http_client(self.url, http_client=client, max_sse_event_size=self.max_bytes)
            self._incoming, self._outgoing = await stack.enter_async_context(opened)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._stack.aclose()

    async def send(self, line: bytes, message: Any) -> None:
        from anyio import BrokenResourceError, ClosedResourceError
        from mcp.shared.message import ClientMessageMetadata, SessionMessage
        from mcp_types import jsonrpc_message_adapter

        parsed = jsonrpc_message_adapter.validate_python(message, by_name=False)
        try:
            await self._outgoing.send(SessionMessage(parsed, ClientMessageMetadata(headers=self._headers(message))))
        except (BrokenResourceError, ClosedResourceError) as error:
            raise ConnectionError("the connection to the server is closed") from error

    async def lines(self) -> AsyncIterator[bytes | None]:
        async for item in self._incoming:
            if isinstance(item, Exception):
                continue  # the SDK has logged it
            message = item.message.model_dump(by_alias=True, mode="json", exclude_unset=True)
            self._learn(message.get("result"))
            yield json.dumps(message, separators=(",", ":")).encode() + b"\n"

    def _learn(self, result: Any) -> None:
        """Note what later requests repeat in their headers: the negotiated version, and arguments of tools."""
        from mcp.shared.inbound import find_invalid_x_mcp_header, x_mcp_header_map

        if not isinstance(result, dict):
            return
        if isinstance(result.get("protocolVersion"), str):
            self._version = result["protocolVersion"]
        tools = result.get("tools")
        for tool in tools if isinstance(tools, list) else ():
            schema = tool.get("inputSchema") if isinstance(tool, dict) else None
            if schema is not None and find_invalid_x_mcp_header(schema) is None:
                self._mirrored[str(tool.get("name"))] = x_mcp_header_map(schema)

    def _headers(self, message: dict[str, Any]) -> dict[str, str]:
        """The headers that the protocol wants besides the body: of a session's version, or of a stateless request."""
        from mcp.shared.inbound import (
            MCP_METHOD_HEADER,
            MCP_NAME_HEADER,
            MCP_PROTOCOL_VERSION_HEADER,
            NAME_BEARING_METHODS,
            encode_header_value,
            mcp_param_headers,
        )
        from mcp_types import PROTOCOL_VERSION_META_KEY

        given = message.get("params")
        params: dict[str, Any] = given if isinstance(given, dict) else {}
        stateless = (params.get("_meta") or {}).get(PROTOCOL_VERSION_META_KEY)
        if not isinstance(stateless, str):
            return {MCP_PROTOCOL_VERSION_HEADER: self._version} if self._version else {}
        headers = {MCP_PROTOCOL_VERSION_HEADER: stateless, MCP_METHOD_HEADER: str(message.get("method"))}
        name = params.get(NAME_BEARING_METHODS.get(headers[MCP_METHOD_HEADER], ""))
        if isinstance(name, str):
            headers[MCP_NAME_HEADER] = encode_header_value(name)
            if headers[MCP_METHOD_HEADER] == "tools/call":
                headers |= mcp_param_headers(self._mirrored.get(name, {}), params.get("arguments") or {})
        return headers


class _Guarded(httpx2.AsyncBaseTransport):
    """Bounds what an answer may hold, and answers for a server that cannot be reached."""

    def __init__(self, inner: httpx2.AsyncBaseTransport, max_bytes: int) -> None:
        self._inner, self._max_bytes = inner, max_bytes

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        try:
            response = await self._inner.handle_async_request(request)
        except httpx2.TransportError as error:
            reason = f"the server cannot be reached: {error or type(error).__name__}"
            return httpx2.Response(
                502, json={"jsonrpc": "2.0", "id": None, "error": {"code": -32000, "message": reason}}
            )
        bounded = self._bounded(response) if "event-stream" not in response.headers.get("content-type", "") else None
        return response if bounded is None else bounded

    def _bounded(self, response: httpx2.Response) -> httpx2.Response:
        stream = _BoundedStream(response.stream, self._max_bytes)
        return httpx2.Response(response.status_code, headers=response.headers, stream=stream)

    async def aclose(self) -> None:
        await self._inner.aclose()


class _BoundedStream(httpx2.AsyncByteStream):
    def __init__(self, inner: Any, max_bytes: int) -> None:
        self._inner, self._left = inner, max_bytes

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            async for chunk in self._inner:
                self._left -= len(chunk)
                if self._left < 0:
                    raise httpx2.StreamError("the answer is over the limit")
                yield chunk
        except httpx2.TransportError as error:
            raise httpx2.StreamError(f"the server broke off: {error}") from error

    async def aclose(self) -> None:
        await self._inner.aclose()
