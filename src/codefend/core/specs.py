"""The parser of specs: the strings that name defenses, attacks, victims and encoders.

Specs are for the command line and for saved configs; in Python, pass objects and keywords. The grammar, in full:

- ``NAME[:KEY=VALUE,...][+prompt=POLICY][+votes=N]``: an entry of a registry, a folder, or ``PREFIX:ID_OR_FOLDER``,
  with options. ``bridge``, ``bridge:sigma=0.1+votes=8``, ``hf:org/model:dtype=bfloat16``, ``none+prompt=doubt``
  (`parse_spec`)
- ``openai:URL#MODEL[?KEY=VALUE&...]``: an endpoint (`parse_endpoint`)
- ``ENCODER[@SIDE]``: an encoder and the side in pixels of its input; several are joined by ``+`` (`parse_encoders`)
- lists are joined by commas; `split_specs` keeps the options of one spec together

`lookup` finds the name of a spec in its registry.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qsl, urlsplit

from codefend.types import CodefendError

PROMPT = "+prompt="  # between a purifier and a prompt policy
VOTES = "+votes="  # behind both: the number of answers under different noise that are voted on

T = TypeVar("T")


@dataclass(frozen=True)
class Spec:
    """A parsed spec: ``name`` is a registry entry, a folder or ``PREFIX:ID``; ``options`` are still text."""

    name: str
    options: Mapping[str, str] = field(default_factory=dict)
    prompt: str = ""  # a prompt policy's name or file; "" for none
    votes: int = 1


@dataclass(frozen=True)
class Endpoint:
    """A parsed ``openai:URL#MODEL?...``."""

    url: str
    model: str
    options: Mapping[str, str]


def parse_spec(text: str, names: Collection[str] = ()) -> Spec:
    """Parse ``NAME[:KEY=VALUE,...][+prompt=POLICY][+votes=N]``; after one of ``names`` and a colon stand options.

    Raises CodefendError for a malformed option, an empty policy, or votes that are no number.

    >>> parse_spec("bridge:sigma=0.1,gate=true+prompt=doubt")
    Spec(name='bridge', options={'sigma': '0.1', 'gate': 'true'}, prompt='doubt', votes=1)
    >>> parse_spec("hf:org/model:device=cuda:1").name
    'hf:org/model'
    """
    text, voted, count = text.partition(VOTES)
    if voted and not (count.isdecimal() and int(count) >= 1):
        raise CodefendError(f"{text}{VOTES}{count}: votes is a whole number of answers, such as {text}{VOTES}8")
    votes = int(count) if voted else 1
    head, plus, prompt = text.partition(PROMPT)
    if plus and not (head and prompt):
        raise CodefendError(f"defense {text!r}: write PURIFIER{PROMPT}POLICY, such as none{PROMPT}doubt")
    options = re.fullmatch(r"(.*?):(\w+=.*)", head, flags=re.DOTALL)
    name, _, tail = head.rpartition(":")
    if Path(head).is_dir():
        return Spec(head, prompt=prompt, votes=votes)
    if options is not None:
        name, tail = options.groups()
    elif name not in names:
        return Spec(head, prompt=prompt, votes=votes)
    return Spec(name, parse_options([item for item in tail.split(",") if item]), prompt, votes)


def lookup(kind: str, name: str, table: Mapping[str, T]) -> T:
    """Return ``table[name]``. Raises CodefendError naming the nearest entries of the table when there is none."""
    if name in table:
        return table[name]
    near = get_close_matches(name, table, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {', '.join(sorted(table))}"
    raise CodefendError(f"unknown {kind} {name!r}; {hint} (`codefend list {kind}s` shows all)")


def parse_options(items: Sequence[str]) -> dict[str, str]:
    """Split ``KEY=VALUE`` items; the last one of a repeated key counts. Raises CodefendError for a malformed one."""
    options = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not key.strip():
            raise CodefendError(f"expected key=value, got {item!r}")
        options[key.strip()] = value.strip()
    return options


def split_specs(items: Sequence[str]) -> tuple[str, ...]:
    """Rejoin specs split at commas: ``("apgd:steps=9", "eot=2", "cw")`` -> ``("apgd:steps=9,eot=2", "cw")``."""
    specs: list[str] = []
    for item in items:
        key, equals, _ = item.partition("=")
        if specs and equals and key.isidentifier():
            specs[-1] += f",{item}"
        else:
            specs.append(item)
    return tuple(specs)


def format_spec(name: str, options: object, defaults: object) -> str:
    """``name:key=value,...`` with the fields of ``options`` that differ from ``defaults``; inverse of `parse_spec`."""
    changes = []
    for key, value in vars(options).items():
        if value != vars(defaults)[key]:
            changes.append(f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}")
    return f"{name}:{','.join(changes)}" if changes else name


def literal(text: str) -> Any:
    """A number, true, false or none where ``text`` reads like one, else the text.

    >>> [literal(text) for text in ("5", "0.1", "true", "lite0")]
    [5, 0.1, True, 'lite0']
    """
    words: dict[str, Any] = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def parse_endpoint(text: str) -> Endpoint:
    """Parse ``openai:URL#MODEL[?KEY=VALUE&...]``.

    Raises CodefendError for anything else, and for a key in the address: it would be saved with the run.
    """
    url, mark, rest = text.removeprefix("openai:").partition("#")
    model, _, query = rest.partition("?")
    parts = urlsplit(url)
    if not mark or not model or parts.scheme not in ("http", "https") or not parts.hostname:
        raise CodefendError(
            f"{text!r} names no endpoint and model; write openai:URL#model, such as openai:http://localhost:8000/v1#llava"
        )
    if parts.username or parts.password:
        raise CodefendError(
            "keep the key out of the address: put it into OPENAI_API_KEY, or name a variable with ?key=NAME"
        )
    return Endpoint(url.rstrip("/"), model, dict(parse_qsl(query, keep_blank_values=True)))


def parse_encoders(text: str) -> list[tuple[str, int | None]]:
    """Parse ``ENCODER[@SIDE]`` or several joined by ``+``, each once: names, and sides in pixels (None: unchanged).

    Raises CodefendError for a side that is not a positive multiple of 32.

    >>> parse_encoders("lite0+lite1@320")
    [('lite0', None), ('lite1', 320)]
    """
    encoders = []
    for label in dict.fromkeys(part.strip() for part in text.split("+")):
        name, at, side = label.partition("@")
        if at and (not side.isdecimal() or int(side) % 32 or not int(side)):
            raise CodefendError(
                f"{label}: write a multiple of 32 after the @, the side in pixels that the encoder sees"
            )
        encoders.append((name, int(side) if at else None))
    return encoders
