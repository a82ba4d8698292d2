"""Which headers pass between client and upstream, and which stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from codefend.gateway.engine import Outcome, Terms
from codefend.gateway.errors import Refused
from codefend.gateway.options import Scores
from codefend.purifiers import ocr
from codefend.purifiers.text_policy import TEXT_POLICIES
from codefend.types import CodefendError

Headers = list[tuple[bytes, bytes]]

_HOP_NAMES = (  # RFC 9110, 7.6.1
    b"connection keep-alive proxy-connection transfer-encoding te trailer upgrade http2-settings proxy-authenticate "
    b"proxy-authorization"
)
_HOP_BY_HOP = frozenset(_HOP_NAMES.split())
KEY_HEADERS = frozenset({b"authorization", b"x-api-key", b"api-key", b"x-goog-api-key"})
# Some servers take these for the method or the path, which were checked here. Others choose whom the key bills.
_REROUTING = frozenset(b"x-http-method-override x-http-method x-method-override x-original-url x-rewrite-url".split())
_ACCOUNTS = frozenset({b"openai-organization", b"openai-project"})
_OURS = b"x-codefend-"
LISTED = 64  # images up to which headers list them one by one: clients bound the size of a header
HEADERS = {  # name: where it stands, what it means
    "x-codefend-key": ("request", "key of this gateway, where `authorization` and `x-api-key` are for the upstream"),
    "x-codefend-policy": ("request", "purify, detect or block for this request; needs `allow_override`"),
    "x-codefend-threshold": ("request", "detection score from which detect and block act; needs `allow_override`"),
    "x-codefend-text": (
        "request, answer",
        "request: a stricter policy for text in images; answer: lines that read like instructions, by image",
    ),
    "x-codefend-request-id": ("answer", "the request in the gateway's logs"),
    "x-codefend-status": ("answer", "purified, reencoded, bypassed (the purifier failed) or refused"),
    "x-codefend-images": ("answer", "number of images of the request"),
    "x-codefend-purifier": ("answer", "purifier by name"),
    "x-codefend-cache": ("answer", f"hit or miss, by image; of {LISTED} images at most, like all headers by image"),
    "x-codefend-ms": ("answer", "time spent on images, in milliseconds"),
    "x-codefend-score": ("answer", "detection score by image; needs `scores`"),
    "x-codefend-votes": ("answer", "requests to the upstream that this one cost; needs `votes` above 1"),
    "x-codefend-bypass": ("answer", "why images passed without purification; needs `on_error=pass`"),
}


def find(headers: Sequence[tuple[bytes, bytes]], name: bytes) -> str | None:
    """Return a header's value. Raises Refused (400) when it is given twice with different values."""
    values = {value for key, value in headers if key == name}
    if len(values) > 1:
        raise Refused(400, "invalid_header", f"the header {name.decode()} is given twice")
    return next(iter(values)).decode("latin-1") if values else None


def to_upstream(
    headers: Sequence[tuple[bytes, bytes]], *, drop: frozenset[bytes] = frozenset(), upstream_key: str | None
) -> Headers:
    """Drop what belongs to this hop or to the gateway, and ``drop``; put the upstream's key in, where there is one."""
    drop = drop | _HOP_BY_HOP | _REROUTING | _named_by_connection(headers) | {b"host", b"content-length", b"expect"}
    if upstream_key is not None:
        drop |= KEY_HEADERS | _ACCOUNTS
    passed = [(key, value) for key, value in headers if key not in drop and not key.startswith(_OURS)]
    if upstream_key is not None:
        passed += [(b"authorization", b"Bearer " + upstream_key.encode()), (b"x-api-key", upstream_key.encode())]
        passed.append((b"api-key", upstream_key.encode()))  # Azure's
    return passed


def to_client(headers: Sequence[tuple[bytes, bytes]]) -> Headers:
    """Drop what belongs to the upstream's hop; everything else, encodings included, passes as it is."""
    lowered = [(key.lower(), value) for key, value in headers]
    drop = _HOP_BY_HOP | _named_by_connection(lowered)
    return [(key, value) for key, value in lowered if key not in drop and not key.startswith(_OURS)]


def visible_score(score: float | None, scores: Scores) -> float | None:
    """The score that a client may know: who sees it exactly can climb it until an image passes."""
    if score is None or scores == "hide":
        return None
    return score if scores == "exact" else round(score, 1)


def report(
    outcome: Outcome | None, *, purifier: str, request_id: str, scores: Scores = "hide", votes: int = 1
) -> Headers:
    """``x-codefend-*``: what was done with the images of this request."""
    lines = {"request-id": request_id}
    if outcome is not None and outcome.images:
        images = outcome.images
        purified = any(image.purified for image in images)
        lines |= {
            "images": str(len(images)),
            "purifier": purifier,
            "status": "bypassed" if outcome.bypassed else "purified" if purified else "reencoded",
            "ms": f"{outcome.seconds * 1000:.1f}",
        }
        listed = images if len(images) <= LISTED else ()
        if listed:
            lines["cache"] = ",".join("hit" if image.cached else "miss" for image in listed)
        if any(image.texts is not None for image in listed):
            lines["text"] = ",".join("-" if image.texts is None else str(len(image.texts)) for image in listed)
        visible = [visible_score(image.score, scores) for image in listed]
        if any(score is not None for score in visible):
            digits = 4 if scores == "exact" else 1
            lines["score"] = ",".join("-" if score is None else f"{score:.{digits}f}" for score in visible)
        if votes > 1:
            lines["votes"] = str(votes)  # so many requests to the upstream did this one cost
        if outcome.bypassed:
            lines["bypass"] = ",".join(outcome.bypassed if listed else dict.fromkeys(outcome.bypassed))
    return [(_OURS + name.encode(), value.encode("latin-1", "replace")) for name, value in lines.items()]


def with_text(standing: Terms, policy: str | None) -> Terms:
    """The terms under the text policy that a request asks for. Raises Refused for one that is not as strict."""
    if policy is None:
        return standing
    if policy not in TEXT_POLICIES:
        raise Refused(400, "invalid_header", f"x-codefend-text must be one of {', '.join(TEXT_POLICIES)}")
    if TEXT_POLICIES.index(policy) < TEXT_POLICIES.index(standing.text):
        raise Refused(403, "override_refused", f"x-codefend-text may only be stricter than {standing.text}")
    try:
        if policy != "off":
            ocr.check_installed()
    except CodefendError as error:
        raise Refused(400, "invalid_header", "this gateway does not read text in images") from error
    return replace(standing, text=policy)


def _named_by_connection(headers: Sequence[tuple[bytes, bytes]]) -> frozenset[bytes]:
    named = [value for key, value in headers if key == b"connection"]
    return frozenset(part.strip().lower() for value in named for part in value.split(b",")) if named else frozenset()
