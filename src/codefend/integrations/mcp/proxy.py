"""Messages between an MCP client and a server: passed on byte for byte, but for the images that the server sends.

The client gets an image purified or not at all. A message whose images cannot be purified is answered as a JSON-RPC
error, to the client or, for a request of the server's own, to the server; so are requests that a dead server leaves
open. Only messages with images wait, each for itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Sequence
from typing import Any, Protocol

from codefend.gateway.engine import Caller, Engine
from codefend.gateway.errors import Refused
from codefend.gateway.worker import Purified
from codefend.integrations.mcp.messages import Documents, Reading, Span, read, write
from codefend.integrations.mcp.upstream import Upstream
from codefend.prompts.image_text import note
from codefend.types import CodefendError

log = logging.getLogger("codefend.mcp")

INVALID_REQUEST, INTERNAL_ERROR = -32600, -32603  # JSON-RPC's own
CONNECTION_CLOSED = -32000  # as in the official SDKs
_PURIFYING = 4  # messages with images at a time; further ones wait at the server

Id = str | int


class Client(Protocol):
    """The MCP client. A message is one line of JSON, with its end. To send to a client that has gone is no error."""

    def lines(self) -> AsyncIterator[bytes]: ...
    async def send(self, line: bytes) -> None: ...


class Proxy:
    """Between one client and one server. ``ready`` is done when the engine can purify."""

    def __init__(
        self,
        client: Client,
        server: Upstream,
        engine: Engine,
        ready: Awaitable[object],
        documents: Documents = "refuse",
    ) -> None:
        self.client, self.server, self.engine, self.documents = client, server, engine, documents
        self._ready = ready
        self._open: set[Id] = set()  # the client's requests without an answer
        self._given_up: set[Id] = set()  # answered by the proxy: what the server still says to them is dropped
        self._places = asyncio.Semaphore(_PURIFYING)
        self._work: set[asyncio.Task[None]] = set()

    async def run(self) -> int:
        """Pass messages on until the client closes (0) or the server ends (1)."""
        reading = asyncio.ensure_future(self._from_client())
        listening = asyncio.ensure_future(self._from_server())
        try:
            await asyncio.wait((reading, listening), return_when=asyncio.FIRST_COMPLETED)
            if reading.done():
                reading.result()
                return 0
            await asyncio.gather(*self._work)
            await self._answer_all("the MCP server has ended", CONNECTION_CLOSED)
            listening.result()
            return 1
        finally:
            for task in (reading, listening, *self._work):
                task.cancel()
            await asyncio.gather(reading, listening, *self._work, return_exceptions=True)

    async def _from_client(self) -> None:
        async for line in self.client.lines():
            message = _loads(line)
            ids = {item["id"] for item in _items(message) if "method" in item and _has_id(item)}
            self._open |= ids
            try:
                await self.server.send(line, message)
            except OSError:
                await self._answer_all("the MCP server takes no requests any more", CONNECTION_CLOSED)
            except ValueError:  # from a transport that takes JSON-RPC alone
                self._open -= ids
                for id_ in ids:
                    await self.client.send(_error(id_, INVALID_REQUEST, "codefend: this is no JSON-RPC request"))

    async def _from_server(self) -> None:
        async for line in self.server.lines():
            if line is None:
                await self._answer_all("the MCP server sent a message over the limit", INTERNAL_ERROR)
                continue
            try:
                reading = await self.engine.aside(len(line), read, line, self.engine.limits, self.documents)
            except Refused as refusal:
                await self._refuse(line, refusal)
                continue
            except Exception as error:  # of this line alone
                await self._refuse(line, _internal(error))
                continue
            if not reading.spans:
                await self._pass_on(line, reading.message)
                continue
            await self._places.acquire()
            task = asyncio.ensure_future(self._purify(line, reading))
            self._work.add(task)
            task.add_done_callback(self._work.discard)

    async def _purify(self, line: bytes, reading: Reading) -> None:
        """Pass on a message with purified images."""
        try:
            await self._ready
            results = await asyncio.gather(*(self._image(span) for span in reading.spans))
            images = [None if result is None else result.image for result in results]
            written = await self.engine.aside(len(line), write, reading, images, self._note(results))
            await self._pass_on(written, reading.message)
        except Refused as refusal:
            await self._refuse(line, refusal)
        except CodefendError as error:
            await self._refuse(line, Refused(503, "not_ready", str(error)))
        except Exception as error:  # fail closed, whatever it is
            await self._refuse(line, _internal(error))
        finally:
            self._places.release()

    def _note(self, results: Sequence[Purified | None]) -> str:
        """What the model is told about text in the images, if the text policy is to quote it."""
        lines = dict.fromkeys(line for result in results if result is not None for line in result.texts or ())
        if lines:
            log.warning("%d lines of text in images read like instructions", len(lines))
        return note(list(lines)).strip() if self.engine.terms.text == "quote" else ""

    async def _image(self, span: Span) -> Purified | None:
        """The purified image, or None for a data URL whose image no purifier can read."""
        if span.data is None:
            return None
        try:
            return await self.engine.purify_file(span.data, self.engine.terms, Caller())
        except Refused as refusal:
            if span.url and refusal.status < 500:
                return None
            raise

    async def _pass_on(self, line: bytes, message: Any) -> None:
        answered = {item["id"] for item in _items(message) if "method" not in item and _has_id(item)}
        self._open -= answered
        if answered and answered <= self._given_up:
            self._given_up -= answered
            return
        await self.client.send(line)

    async def _refuse(self, line: bytes, refusal: Refused) -> None:
        """Answer in place of a message of the server's that is not passed on."""
        log.warning("%s: %s", refusal.code, refusal.message)
        message = None if refusal.code == "body_too_complex" else _loads(line)
        if message is None and line.lstrip()[:1] in (b"{", b"["):  # else a log line on the wrong stream
            await self._answer_all(refusal.message, INTERNAL_ERROR)
        for item in filter(_has_id, _items(message)):
            error = _error(item["id"], INTERNAL_ERROR, f"codefend: {refusal.message}", {"code": refusal.code})
            if "method" in item:
                with contextlib.suppress(OSError):
                    await self.server.send(error, json.loads(error))
            else:
                await self._pass_on(error, json.loads(error))

    async def _answer_all(self, reason: str, code: int) -> None:
        """Answer every open request: no other answer will come, or none that can be told apart."""
        log.warning("%s", reason)
        ids, self._open = self._open, set()
        self._given_up |= ids
        for id_ in ids:
            await self.client.send(_error(id_, code, f"codefend: {reason}"))


def _internal(error: Exception) -> Refused:
    log.error("internal error", exc_info=error)
    return Refused(500, "internal_error", f"internal error ({type(error).__name__})")


def _loads(line: bytes) -> Any:
    """What the line holds; None for what is not JSON."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _items(message: Any) -> list[dict[str, Any]]:
    """The messages of a batch, or the one message."""
    return [item for item in (message if isinstance(message, list) else [message]) if isinstance(item, dict)]


def _has_id(item: dict[str, Any]) -> bool:
    return isinstance(item.get("id"), (str, int))


def _error(id_: Id, code: int, message: str, data: dict[str, Any] | None = None) -> bytes:
    error = {"code": code, "message": message} | ({} if data is None else {"data": data})
    return json.dumps({"jsonrpc": "2.0", "id": id_, "error": error}).encode() + b"\n"
