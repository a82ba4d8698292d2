"""Progress is a line now and then, or a bar on a terminal."""

from __future__ import annotations

import sys

import pytest

from codefend.core.progress import progress


def test_progress_is_silent_between_its_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("work", 10, every=3600) as advance:
        for _ in range(10):
            advance()
    assert capsys.readouterr() == ("", "")
    with progress("work", 10, done=4, every=0) as advance:
        advance(2, "loss 0.5")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("work: 6/10, about 0 s left  loss 0.5")
    assert err.count("\n") == 1


def test_progress_on_a_terminal_draws_on_standard_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress("work", 2) as advance:
        advance(note="first")
        advance()
    out, err = capsys.readouterr()
    assert out == ""
    assert "work" in err
    assert "2/2" in err
