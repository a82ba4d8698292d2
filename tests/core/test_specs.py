"""Specs: every form of the grammar is parsed, malformed ones are refused, and formatting round-trips."""

from __future__ import annotations

import doctest
from dataclasses import dataclass
from pathlib import Path

import pytest

from codefend.core import specs
from codefend.core.specs import Spec, format_spec, literal, parse_encoders, parse_endpoint, parse_options, parse_spec
from codefend.types import CodefendError


def test_the_examples_of_the_docstrings_hold() -> None:
    assert doctest.testmod(specs).failed == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("bridge", Spec("bridge")),
        ("bridge:sigma=0.1,gate=true", Spec("bridge", {"sigma": "0.1", "gate": "true"})),
        ("bridge+prompt=doubt", Spec("bridge", {}, "doubt")),
        ("none+prompt=runs/a:b.json", Spec("none", {}, "runs/a:b.json")),
        ("hf-latent:org/model:t=0.1,steps=1", Spec("hf-latent:org/model", {"t": "0.1", "steps": "1"})),
        ("org/model:dtype=float16,device=cuda:1", Spec("org/model", {"dtype": "float16", "device": "cuda:1"})),
        ("some/folder", Spec("some/folder")),
    ],
)
def test_specs_are_parsed(text: str, expected: Spec) -> None:
    assert parse_spec(text) == expected


def test_a_known_name_may_be_followed_by_options_only() -> None:
    with pytest.raises(CodefendError, match="key=value"):
        parse_spec("jpeg:75", names=["jpeg"])
    assert parse_spec("other:75", names=["jpeg"]) == Spec("other:75")


@pytest.mark.parametrize("text", ["+prompt=doubt", "bridge+prompt="])
def test_a_prompt_policy_needs_both_sides(text: str) -> None:
    with pytest.raises(CodefendError, match="PURIFIER"):
        parse_spec(text)


def test_the_path_of_a_folder_may_contain_any_characters(tmp_path: Path) -> None:
    folder = tmp_path / "run:a=1"
    folder.mkdir()
    assert parse_spec(str(folder)) == Spec(str(folder))


def test_options_are_split_at_the_first_equals_sign() -> None:
    assert parse_options(["a=1", "b = x=y", "a=2"]) == {"a": "2", "b": "x=y"}
    for item in ("a", "=1"):
        with pytest.raises(CodefendError, match="key=value"):
            parse_options([item])


def test_options_stay_with_their_spec_in_a_list() -> None:
    assert specs.split_specs(["apgd:steps=9", "eot=2", "cw"]) == ("apgd:steps=9,eot=2", "cw")


def test_a_formatted_spec_is_parsed_again() -> None:
    @dataclass
    class Options:
        sigma: float = 0.05
        gate: bool = False

    text = format_spec("bridge", Options(sigma=0.1, gate=True), Options())
    assert {key: literal(value) for key, value in parse_spec(text).options.items()} == {"sigma": 0.1, "gate": True}
    assert format_spec("bridge", Options(), Options()) == "bridge"


def test_endpoints_are_parsed() -> None:
    endpoint = parse_endpoint("openai:http://localhost:8000/v1/#llava?rpm=60&cache=")
    assert (endpoint.url, endpoint.model) == ("http://localhost:8000/v1", "llava")
    assert endpoint.options == {"rpm": "60", "cache": ""}


@pytest.mark.parametrize("text", ["openai:", "openai:http://x/v1", "openai:ftp://x#m", "openai:http://u:p@x/v1#m"])
def test_malformed_endpoints_are_refused(text: str) -> None:
    with pytest.raises(CodefendError):
        parse_endpoint(text)


@pytest.mark.parametrize("text", ["lite0@", "lite0@30", "lite0@0", "lite0@big"])
def test_the_side_of_an_encoder_is_a_multiple_of_32(text: str) -> None:
    with pytest.raises(CodefendError, match="multiple of 32"):
        parse_encoders(text)
