"""Strict JSON: a body that two parsers could read differently is refused, never passed on."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from codefend.gateway.errors import Refused
from codefend.gateway.excise import excise


def parse(raw: bytes) -> Any:
    """Read JSON as UTF-8. Raises Refused (400) for what parsers disagree about: repeated keys, NaN, a byte order mark.

    Upstreams written in other languages may take the first of two equal keys where Python takes the last.
    """
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_no_repeats, parse_constant=_no_constants)
    except UnicodeDecodeError as error:
        raise Refused(400, "invalid_json", "the body is not UTF-8") from error
    except RecursionError as error:
        raise Refused(400, "invalid_json", "the body is nested too deeply") from error
    except ValueError as error:
        raise Refused(400, "invalid_json", f"the body is not valid JSON: {str(error)[:120]}") from error


def parse_long(raw: bytes) -> Any:
    """Read JSON that is simple but for the length of its strings, such as images. Raises Refused as `check_simple`."""
    check_simple(excise(raw).raw)
    return parse(raw)


def dump(body: Any) -> bytes:
    """Write JSON without spaces. Raises Refused (400) for numbers that JSON cannot hold."""
    try:
        return json.dumps(body, separators=(",", ":"), allow_nan=False).encode("ascii")
    except (ValueError, RecursionError) as error:
        raise Refused(400, "invalid_json", f"the body cannot be passed on: {str(error)[:120]}") from error


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        ((repeated, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise Refused(400, "invalid_json", f"the key {repeated[:60]!r} appears twice in one object")
    return unique


def _no_constants(text: str) -> Any:
    raise Refused(400, "invalid_json", f"{text} is not a JSON number")


_MAX_PARSED = 16 << 20  # bytes parsed in one go: some 2.5 ms each MB, in which the event loop stands still
_MAX_COMMAS = 1_000_000  # a list of a million numbers holds the interpreter for some 30 ms


def check_simple(raw: bytes) -> None:
    """Raise Refused (413) for a body that would keep the parser, and with it the event loop, for long."""
    if len(raw) > _MAX_PARSED:
        raise Refused(413, "body_too_complex", f"the body has more than {_MAX_PARSED:,} bytes that are not images")
    if raw.count(b",") > _MAX_COMMAS:
        raise Refused(413, "body_too_complex", f"the body has more than {_MAX_COMMAS:,} values")
