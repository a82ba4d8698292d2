"""Settings from the command line are read as their field's type, or refused with the nearest name."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pytest

from codefend.core.settings import check_keys, known_keys, number, override, read_settings
from codefend.types import CodefendError


@dataclass(frozen=True)
class Model:
    width: int = 32
    heads: tuple[int, ...] = (2, 4)


@dataclass(frozen=True)
class Settings:
    steps: int = 100
    eps: float = 8 / 255
    ema: bool = True
    mode: Literal["fast", "slow"] = "fast"
    limit: int | None = None
    out: Path = Path("x")
    name: str = "a"
    pair: tuple[int, float] = (1, 2.0)
    names: list[str] = field(default_factory=list)
    model: Model = field(default_factory=Model)
    table: dict[str, int] = field(default_factory=dict)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("steps", "7", 7),
        ("eps", "4/255", 4 / 255),
        ("eps", "1e-3", 1e-3),
        ("ema", "off", False),
        ("mode", "slow", "slow"),
        ("limit", "none", None),
        ("limit", "3", 3),
        ("out", "runs/a", Path("runs/a")),
        ("name", "a=b", "a=b"),
        ("pair", "3,1/2", (3, 0.5)),
        ("names", "a, b", ["a", "b"]),
    ],
)
def test_values_take_the_type_of_their_field(key: str, text: str, value: Any) -> None:
    changed = override(Settings(), {key: text})
    assert getattr(changed, key) == value
    assert type(getattr(changed, key)) is type(value)


def test_nested_keys_leave_the_rest_alone() -> None:
    changed = override(Settings(), {"model.width": "64", "model.heads": "8", "steps": "1"})
    assert changed == Settings(steps=1, model=Model(64, (8,)))
    assert Settings().model.width == 32


def test_dependent_settings_may_come_in_any_order() -> None:
    @dataclass(frozen=True)
    class Even:
        whole: int = 4
        part: int = 2

        def __post_init__(self) -> None:
            if self.whole % self.part:
                raise CodefendError("part must divide whole")

    for order in (("part", "whole"), ("whole", "part")):
        settings = {name: {"part": "3", "whole": "9"}[name] for name in order}
        assert override(Even(), settings) == Even(9, 3)
    with pytest.raises(CodefendError, match="divide"):
        override(Even(), {"part": "3"})


def test_unknown_keys_name_the_nearest() -> None:
    with pytest.raises(CodefendError, match=r"unknown setting 'stpes'; did you mean 'steps'\?"):
        override(Settings(), {"stpes": "1"})
    with pytest.raises(CodefendError, match=r"did you mean 'model\.width'"):
        check_keys(Settings(), {"model.widht": "1"})
    with pytest.raises(CodefendError, match="known: steps, eps"):
        check_keys(Settings(), {"qqqqqq": "1"})
    assert "model" not in known_keys(Settings())


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("steps", "1.5"),
        ("eps", "x"),
        ("eps", "1/0"),
        ("ema", "maybe"),
        ("mode", "medium"),
        ("limit", "some"),
        ("pair", "1"),
        ("table", "a:1"),
        ("model.heads", "a"),
    ],
)
def test_bad_values_are_user_errors(key: str, text: str) -> None:
    with pytest.raises(CodefendError):
        override(Settings(), {key: text})


def test_number_reads_fractions() -> None:
    assert number("8/255") == 8 / 255
    assert number("0.5") == 0.5
    with pytest.raises(CodefendError, match="8/255"):
        number("8/two")


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e999", "nan/255", "inf/255"])
def test_numbers_must_be_finite(text: str) -> None:
    with pytest.raises(CodefendError, match="not a finite number"):
        override(Settings(), {"eps": text})


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.toml", 'steps = 7\neps = "4/255"\nema = false\nnames = ["a", "b"]\n[model]\nwidth = 8\n'),
        (
            "a.json",
            '{"steps": 7, "eps": "4/255", "ema": false, "limit": null, "names": ["a", "b"], "model": {"width": 8}}',
        ),
    ],
)
def test_settings_are_read_from_a_file(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    changed = override(Settings(limit=3), read_settings(tmp_path / name))
    expected = Settings(steps=7, eps=4 / 255, ema=False, names=["a", "b"], model=Model(8))
    assert changed == (replace(expected, limit=3) if name == "a.toml" else expected)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.toml", "steps = ", "neither valid TOML nor JSON"),
        ("a.json", "[1]", "must hold keys and values"),
        ("a.toml", "steps = 2026-11-30", "steps must be text, a number"),
        ("a.toml", "names = [[1]]", "names must be text, a number"),
        ("absent.toml", None, "cannot read"),
    ],
)
def test_a_file_without_settings_is_refused_with_its_name(
    tmp_path: Path, name: str, text: str | None, message: str
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(CodefendError, match=message) as error:
        read_settings(tmp_path / name)
    assert name in str(error.value)
