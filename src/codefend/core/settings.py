"""Override the fields of config dataclasses, by ``key=value`` text or typed; nested fields as ``model.width=64``."""

from __future__ import annotations

import json
import math
import tomllib
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from codefend.types import CodefendError

Config = TypeVar("Config")


def number(text: str) -> float:
    """Read ``0.03`` or ``8/255``. Raises CodefendError when it is neither, or not finite."""
    top, slash, bottom = text.partition("/")
    try:
        value = float(top) / float(bottom) if slash else float(top)
    except (ValueError, ZeroDivisionError) as error:
        raise CodefendError(f"{text!r} is not a number; write it as 0.03 or 8/255") from error
    if not math.isfinite(value):
        raise CodefendError(f"{text!r} is not a finite number; write it as 0.03 or 8/255")
    return value


def recorded(config: Any, *, later: str) -> dict[str, object]:
    """The fields to save with a run: all before the field ``later``, and those after it that differ from the default.

    So a run that was saved before a later field existed can still be resumed.
    """
    names = [field.name for field in fields(config)]
    defaults = {f.name for f in fields(config)[names.index(later) :] if getattr(config, f.name) == f.default}
    return {name: value for name, value in asdict(config).items() if name not in defaults}


def read_settings(path: str | Path) -> dict[str, str]:
    """The settings of a TOML or ``.json`` file as ``override`` takes them; keys of nested tables are joined by dots.

    Raises CodefendError when the file is missing, damaged, or holds a value that no setting has.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise CodefendError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise CodefendError(f"{path} is neither valid TOML nor JSON by its ending: {error}") from error
    if not isinstance(values, dict):
        raise CodefendError(f"{path} must hold keys and values, such as steps = 300")
    return dict(_as_text(values, path))


def _as_text(values: Mapping[str, Any], path: Path, above: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        key = above + name
        if isinstance(value, dict):
            yield from _as_text(value, path, f"{key}.")
            continue
        parts = value if isinstance(value, list) else [value]
        if not all(isinstance(part, str | int | float) or part is None for part in parts):
            raise CodefendError(f"{path}: {key} must be text, a number, true, false or a list of these")
        yield key, ",".join(str(part) for part in parts)


def known_keys(config: Any) -> list[str]:
    """All keys that can be set, in order; nested ones with dots."""
    keys = []
    for field in fields(config):
        value = getattr(config, field.name)
        nested = is_dataclass(value) and not isinstance(value, type)
        keys += [f"{field.name}.{inner}" for inner in known_keys(value)] if nested else [field.name]
    return keys


def check_keys(config: Any, settings: Iterable[str]) -> None:
    """Raise CodefendError for a setting that ``config`` has no field for, naming the nearest field."""
    known = known_keys(config)
    for key in settings:
        if key in known:
            continue
        near = get_close_matches(key, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
        raise CodefendError(f"unknown setting {key!r}; {hint}")


def override(config: Config, settings: Mapping[str, object]) -> Config:
    """Return a copy of the dataclass with each setting; text is read as its field's type.

    Raises CodefendError for an unknown key (the nearest is named) or a text that the field's type cannot hold.
    """
    check_keys(config, settings)
    if not settings:
        return config
    changed: Config = _overridden(config, [(key.split("."), value) for key, value in settings.items()])
    return changed


def _overridden(config: Any, settings: Sequence[tuple[Sequence[str], object]], above: str = "") -> Any:
    """Apply all settings of a dataclass at once, so that checks of several fields see their final values."""
    kinds, values = get_type_hints(type(config)), {}
    for name in dict.fromkeys(path[0] for path, _ in settings):
        old, key = getattr(config, name), above + name
        inner = [(path[1:], value) for path, value in settings if path[0] == name]
        value = inner[0][1]
        if is_dataclass(old):
            values[name] = _overridden(old, inner, f"{key}.")
        else:
            values[name] = _read(value, kinds[name], key) if isinstance(value, str) else value
    return replace(config, **values)


def _read(text: str, kind: Any, key: str) -> Any:
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _read_union(text, args, key)
    if origin is Literal:
        matches = [choice for choice in args if str(choice) == text]
        if not matches:
            raise CodefendError(f"{key}={text}: choose one of {', '.join(map(str, args))}")
        return matches[0]
    if origin in (tuple, list):
        return _read_sequence(text, origin, args, key)
    if kind is bool:
        return _read_bool(text, key)
    if kind is float:
        return number(text)
    if kind in (int, str, Path):
        try:
            return kind(text)
        except ValueError as error:
            raise CodefendError(f"{key}={text}: not a whole number") from error
    raise CodefendError(f"{key} cannot be set on the command line")


def _read_union(text: str, choices: Sequence[Any], key: str) -> Any:
    if type(None) in choices and text.lower() in ("none", ""):
        return None
    failure = CodefendError(f"{key} cannot be set on the command line")
    for choice in choices:
        if choice is not type(None):
            try:
                return _read(text, choice, key)
            except CodefendError as error:
                failure = error
    raise failure


def _read_sequence(text: str, kind: type, args: Sequence[Any], key: str) -> Any:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if kind is tuple and Ellipsis not in args:
        if len(parts) != len(args):
            raise CodefendError(f"{key}={text}: expected {len(args)} values with commas between them")
        return tuple(_read(part, arg, key) for part, arg in zip(parts, args, strict=True))
    return kind(_read(part, args[0], key) for part in parts)


def _read_bool(text: str, key: str) -> bool:
    words = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    if text.lower() not in words:
        raise CodefendError(f"{key}={text}: expected true or false")
    return words[text.lower()]
