"""Which headers pass between client and upstream, and which stay."""

from __future__ import annotations

from collections.abc import Sequence

from codefend.gateway.engine import Outcome
from codefend.gateway.errors import Refused

Headers = list[tuple[bytes, bytes]]

_HOP_NAMES = (  # RFC 9110, 7.6.1
    b"connection keep-alive proxy-connection transfer-encoding te trailer upgrade proxy-authenticate "
    b"proxy-authorization"
)
_HOP_BY_HOP = frozenset(_HOP_NAMES.split())
_OURS = b"x-codefend-"


def find(headers: Sequence[tuple[bytes, bytes]], name: bytes) -> str | None:
    """Return a header's value. Raises Refused (400) when it is given twice with different values."""
    values = {value for key, value in headers if key == name}
    if len(values) > 1:
        raise Refused(400, "invalid_header", f"the header {name.decode()} is given twice")
    return next(iter(values)).decode("latin-1") if values else None


def to_upstream(
    headers: Sequence[tuple[bytes, bytes]], *, key_header: bytes | None, upstream_key: str | None
) -> Headers:
    """Drop what belongs to this hop or to the gateway; put the upstream's key in, where the operator has given one."""
    drop = _HOP_BY_HOP | _named_by_connection(headers) | {b"host", b"content-length", b"expect"}
    if key_header is not None:
        drop |= {key_header}
    if upstream_key is not None:
        drop |= {b"authorization", b"x-api-key"}
    passed = [(key, value) for key, value in headers if key not in drop and not key.startswith(_OURS)]
    if upstream_key is not None:
        passed += [(b"authorization", b"Bearer " + upstream_key.encode()), (b"x-api-key", upstream_key.encode())]
    return passed


def to_client(headers: Sequence[tuple[bytes, bytes]]) -> Headers:
    """Drop what belongs to the upstream's hop; everything else, encodings included, passes as it is."""
    lowered = [(key.lower(), value) for key, value in headers]
    drop = _HOP_BY_HOP | _named_by_connection(lowered)
    return [(key, value) for key, value in lowered if key not in drop and not key.startswith(_OURS)]


def report(outcome: Outcome | None, *, purifier: str, request_id: str) -> Headers:
    """``x-codefend-*``: what was done with the images of this request."""
    lines = {"request-id": request_id}
    if outcome is not None and outcome.images:
        done = outcome.images
        lines |= {
            "images": str(len(done)),
            "purifier": purifier,
            "status": "bypassed" if outcome.bypassed else "purified" if any(i.purified for i in done) else "reencoded",
            "cache": ",".join("hit" if image.cached else "miss" for image in done),
            "ms": f"{outcome.seconds * 1000:.1f}",
        }
        if any(image.score is not None for image in done):
            lines["score"] = ",".join("-" if i.score is None else f"{i.score:.4f}" for i in done)
        if outcome.bypassed:
            lines["bypass"] = ",".join(outcome.bypassed)
    return [(_OURS + name.encode(), value.encode("latin-1", "replace")) for name, value in lines.items()]


def _named_by_connection(headers: Sequence[tuple[bytes, bytes]]) -> frozenset[bytes]:
    named = [value for key, value in headers if key == b"connection"]
    return frozenset(part.strip().lower() for value in named for part in value.split(b",")) if named else frozenset()
