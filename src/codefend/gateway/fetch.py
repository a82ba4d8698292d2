"""Remote images, when the operator allows them: https only, public addresses only, pinned, capped in size and number.

The name is resolved once and the connection goes to that very address, so that a second answer of the name server
(DNS rebinding) never counts. Every redirect is checked like the first address. No connection
is used twice: it is pooled by address, and the certificate was checked for the name it was opened for.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any
from weakref import WeakValueDictionary

import httpx2

from codefend.gateway.errors import Refused
from codefend.gateway.options import FetchOptions

Resolve = Callable[[str], Awaitable[Sequence[str]]]
Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_NAT64 = (ipaddress.IPv6Network("64:ff9b::/96"), ipaddress.IPv6Network("64:ff9b:1::/48"))  # RFC 6052, RFC 8215
_EXTRA = (  # not public, whatever the standard library of this Python says
    ipaddress.ip_network("100.64.0.0/10"),  # carrier-grade NAT, RFC 6598
    ipaddress.ip_network("168.63.129.16/32"),  # Azure's platform address
    ipaddress.ip_network("192.0.0.0/24"),  # protocol assignments, RFC 6890; Oracle's metadata is in it
    ipaddress.ip_network("192.88.99.0/24"),  # 6to4 relays, RFC 7526
    ipaddress.ip_network("::/96"),  # IPv4-compatible, RFC 4291
    ipaddress.ip_network("2001::/23"),  # protocol assignments, RFC 2928
    ipaddress.ip_network("3fff::/20"),  # documentation, RFC 9637
    ipaddress.ip_network("5f00::/16"),  # segment routing, RFC 9602
    ipaddress.ip_network("fec0::/10"),  # site-local, RFC 3879
)
_REDIRECTS = frozenset({301, 302, 303, 307, 308})


def is_public(address: str) -> bool:
    """Tell whether an IP address, and every IPv4 address wrapped in it, belongs to the public internet."""
    try:
        ip: Address = ipaddress.ip_address(address)
    except ValueError:
        return False
    if any(ip.version == net.version and ip in net for net in _EXTRA):
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.scope_id is not None:
            return False
        inner = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
        if any(ip in net for net in _NAT64):
            inner.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
        wrapped = [v4 for v4 in inner if v4 is not None]
        if wrapped:
            return all(is_public(str(v4)) for v4 in wrapped)
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


def check_url(text: str, options: FetchOptions) -> httpx2.URL:
    """Parse a remote URL. Raises Refused (400, 403) for all but plain https to an allowed host name."""
    if not options.allowed:
        message = "remote image URLs are not allowed here; send the image as data:image/...;base64,..."
        raise Refused(400, "remote_image_refused", message)
    try:
        url = httpx2.URL(text)
    except (httpx2.InvalidURL, ValueError) as error:
        raise Refused(400, "remote_image_refused", "the image URL is malformed") from error
    host = url.host.rstrip(".").lower()
    if url.scheme != "https" or url.userinfo or url.port not in (None, 443) or not host:
        raise Refused(400, "remote_image_refused", "image URLs must be plain https on port 443, without a login")
    if _numeric(host) and not is_public(host.strip("[]")):
        raise Refused(403, "remote_image_refused", "the image URL does not name a public address")
    if options.hosts and not any(host == known or host.endswith(f".{known}") for known in options.hosts):
        raise Refused(403, "remote_image_refused", "images from this host are not allowed here")
    return url


def _numeric(host: str) -> bool:
    # 2130706433, 0x7f.1, 0177.0.0.1 and 127.1 are addresses to many resolvers, and names to none.
    last = host.rsplit(".", 1)[-1]
    return ":" in host or last.isdigit() or last.startswith("0x")


async def resolve(host: str) -> Sequence[str]:
    """Ask the system's resolver for all addresses of a host."""
    entries = await asyncio.get_running_loop().getaddrinfo(host, 443, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in entries]


def unpooled_transport(**options: Any) -> httpx2.AsyncHTTPTransport:
    """A transport that opens a connection, and checks the server's certificate, for every request."""
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=0)
    return httpx2.AsyncHTTPTransport(trust_env=False, retries=0, limits=limits, **options)


class Fetcher:
    """Fetch one image over https into memory. ``transport`` and ``resolver`` can be replaced in tests."""

    def __init__(
        self,
        options: FetchOptions,
        *,
        max_bytes: int,
        transport: httpx2.AsyncBaseTransport | None = None,
        resolver: Resolve = resolve,
    ) -> None:
        self.options, self.max_bytes, self.resolver = options, max_bytes, resolver
        self._transport = transport or unpooled_transport()
        self.in_flight = 0
        self._all = asyncio.Semaphore(options.concurrent)
        self._clients: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    async def __call__(self, text: str, client: str = "", take: Callable[[int], None] = lambda size: None) -> bytes:
        """Return the bytes behind a URL; ``take`` accounts for each piece.

        Raises Refused with what a client may know, never an internal address; 503 when too many are fetched.
        """
        url = check_url(text, self.options)
        async with self._slot(client):
            return await self._fetch(url, take)

    @asynccontextmanager
    async def _slot(self, client: str) -> AsyncIterator[None]:
        """Wait for one of the concurrent fetches, of which a client has no more than half."""
        mine = self._clients.setdefault(client, asyncio.Semaphore(max(1, self.options.concurrent // 2)))
        async with AsyncExitStack() as acquired:  # releases them also when a waiting request is cancelled
            try:
                async with asyncio.timeout(self.options.timeout_s):
                    for semaphore in (mine, self._all):
                        await acquired.enter_async_context(semaphore)
            except TimeoutError as error:
                message = "too many remote images are fetched already"
                raise Refused(503, "too_many_fetches", message, retry_after=self.options.timeout_s) from error
            self.in_flight += 1
            try:
                yield
            finally:
                self.in_flight -= 1

    async def _fetch(self, url: httpx2.URL, take: Callable[[int], None]) -> bytes:
        try:
            async with asyncio.timeout(self.options.timeout_s):
                for _ in range(self.options.max_redirects + 1):
                    answer = await self._hop(url, take)
                    if isinstance(answer, bytes):
                        return answer
                    url = check_url(str(url.join(answer)), self.options)
        except TimeoutError as error:
            raise Refused(408, "remote_image_failed", "the image took too long to fetch") from error
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError) as error:
            raise Refused(400, "remote_image_failed", "the image could not be fetched") from error
        raise Refused(400, "remote_image_failed", f"more than {self.options.max_redirects} redirects")

    async def aclose(self) -> None:
        await self._transport.aclose()

    async def _hop(self, url: httpx2.URL, take: Callable[[int], None]) -> bytes | str:
        """Return the body, or where a redirect leads."""
        host = url.host.rstrip(".")
        addresses = await self.resolver(host)
        if not addresses or not all(is_public(address) for address in addresses):
            raise Refused(403, "remote_image_refused", "the image URL does not lead to a public address")
        request = httpx2.Request(
            "GET",
            url.copy_with(host=addresses[0]),
            headers={"host": host, "accept": "image/*", "accept-encoding": "identity", "user-agent": "codefend"},
            extensions={"sni_hostname": host, "timeout": dict.fromkeys(("connect", "read", "write", "pool"), 10.0)},
        )
        response = await self._transport.handle_async_request(request)
        try:
            if response.status_code in _REDIRECTS and "location" in response.headers:
                return str(response.headers["location"])
            return await self._body(response, take)
        finally:
            await response.aclose()

    async def _body(self, response: httpx2.Response, take: Callable[[int], None]) -> bytes:
        if response.status_code != 200:
            raise Refused(400, "remote_image_failed", f"the image's server answered {response.status_code}")
        if response.headers.get("content-encoding", "identity") != "identity":
            raise Refused(400, "remote_image_failed", "the image's server sent compressed content")
        parts, size = [], 0
        async for chunk in response.stream:  # type: ignore[union-attr]
            size += len(chunk)
            if size > self.max_bytes:
                raise Refused(413, "image_too_large", f"the image has over {self.max_bytes:,} bytes")
            take(len(chunk))
            parts.append(chunk)
        return b"".join(parts)
