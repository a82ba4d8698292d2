"""The record of an attack."""

from __future__ import annotations

from codefend.attacks.base import Trace


def test_trace_needs_the_hooks() -> None:
    assert not Trace().attach(object())
