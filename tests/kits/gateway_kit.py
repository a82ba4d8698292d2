"""A capturing upstream, images with known pixels, a purifier whose result is known, and a bare ASGI driver."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx2
import torch
from starlette.applications import Starlette
from torch import Generator, Tensor

from codefend.core import images
from codefend.gateway.app import create_app
from codefend.gateway.config import Settings, load_settings
from purifiers_kit import PlainPurifier

T = TypeVar("T")
CHAT = "/v1/chat/completions"


class Invert(PlainPurifier):
    """A purifier that returns the negative. Its score is the mean of the image."""

    name = "invert"

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []

    def forward(self, images: Tensor, *, generator: Generator | None = None) -> Tensor:
        self.batches.append(len(images))
        return 1 - images

    def judge(self, images: Tensor, purified: Tensor) -> Tensor:
        return images.flatten(1).mean(1)


def image(seed: int = 0, *, height: int = 12, width: int = 16, shade: float = 0.5) -> Tensor:
    """Noise around ``shade``; every seed gives another image."""
    noise = torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed))
    return images.quantize8((shade + 0.2 * (noise - 0.5)).clamp(0, 1))


def png(seed: int = 0, **size: Any) -> bytes:
    """A file with something behind its end, which re-encoding must not keep."""
    return images.encode(image(seed, **size)) + b"TRAILING"


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def url(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{b64(data)}"


def chat(*datas: bytes, text: str = "what?", **extra: Any) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{"type": "text", "text": text}]
    parts += [{"type": "image_url", "image_url": {"url": url(data)}} for data in datas]
    return {"model": "m", "messages": [{"role": "user", "content": parts}], **extra}


def settings(**flags: Any) -> Settings:
    return load_settings(**({"upstream": "http://upstream.test:9/v1", "purifier": "identity"} | flags))


@dataclass
class Upstream:
    """Records every request; answers ``reply``, or what ``handler`` returns for the request."""

    reply: dict[str, Any] = field(default_factory=lambda: {"ok": True})
    handler: Callable[[httpx2.Request], httpx2.Response | Awaitable[httpx2.Response]] | None = None
    requests: list[httpx2.Request] = field(default_factory=list)

    @property
    def transport(self) -> httpx2.MockTransport:
        async def handle(request: httpx2.Request) -> httpx2.Response:
            await request.aread()
            self.requests.append(request)
            if self.handler is None:
                return httpx2.Response(200, json=self.reply, headers={"x-upstream": "yes"})
            answer = self.handler(request)
            return answer if isinstance(answer, httpx2.Response) else await answer

        return httpx2.MockTransport(handle)

    @property
    def body(self) -> Any:
        return json.loads(self.requests[-1].content)

    def images(self) -> list[Tensor]:
        """Every image in the last request, wherever it stands."""
        decoded = []
        stack = [self.body]
        while stack:
            value = stack.pop()
            if isinstance(value, dict):
                stack += reversed(list(value.values()))
            elif isinstance(value, list):
                stack += reversed(value)
            elif isinstance(value, str) and value.startswith("data:image/"):
                decoded.append(images.load(value).pixels)
            elif isinstance(value, str) and len(value) > 60 and " " not in value:
                decoded.append(images.load(base64.b64decode(value)).pixels)
        return decoded

    def received(self, *originals: bytes) -> bool:
        """Whether any byte form of an original reached the upstream."""
        sent = b"".join(request.content for request in self.requests)
        return any(original in sent or b64(original).encode() in sent for original in originals)


@asynccontextmanager
async def gateway(
    upstream: Upstream, *, purifier: Any = None, app: Starlette | None = None, **flags: Any
) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of a running gateway in this process."""
    app = app or create_app(settings(**flags), purifier=purifier or Invert(), transport=upstream.transport)
    async with app.router.lifespan_context(app):
        transport = httpx2.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx2.AsyncClient(transport=transport, base_url="http://gateway.test") as client:
            yield client


def run(work: Coroutine[Any, Any, T], seconds: float = 30) -> T:
    return asyncio.run(asyncio.wait_for(work, seconds))


@dataclass
class Driver:
    """Drives an ASGI app as a server does, message by message, to observe streams and disconnects."""

    app: Any
    body: bytes
    path: str = "/v1/chat/completions"
    sent: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.gone, self.news = asyncio.Event(), asyncio.Event()
        self._read = False

    async def receive(self) -> dict[str, Any]:
        if not self._read:
            self._read = True
            return {"type": "http.request", "body": self.body, "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)
        self.news.set()

    async def run(self) -> None:
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": self.path,
            "raw_path": self.path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"content-type", b"application/json"), (b"host", b"gateway.test")],
            "client": ("127.0.0.1", 1),
            "server": ("gateway.test", 80),
        }
        await self.app(scope, self.receive, self.send)

    async def until(self, count: int) -> None:
        """Wait for that many messages of the app's."""
        while len(self.sent) < count:
            self.news.clear()
            await self.news.wait()

    @property
    def text(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)


@contextmanager
def served(app: Starlette, **options: Any) -> Iterator[str]:
    """The app behind a real server in a thread, with more of uvicorn's options."""
    import uvicorn

    from codefend.gateway.serve import HTTP

    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", **(HTTP | options)))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_for(lambda: server.started)
    try:
        yield f"{'https' if 'ssl_certfile' in options else 'http'}://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)


def wait_for(done: Callable[[], Any], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)
