"""The command line in this process, the records on disk, and how records are compared."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import platform
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

DATA = Path(__file__).parent / "data"
PROJECT = Path(__file__).parents[2] / "pyproject.toml"
ABSOLUTE = 1e-5  # of pixels and scores, on another processor than the recorded one
RELATIVE = 1e-4  # of losses and objectives, on any

Arrays = dict[str, NDArray[Any]]


# --- the command line ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def entry_point() -> str:
    """``module:function`` of the ``codefend`` command, as pyproject.toml names it."""
    scripts = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]["scripts"]
    return str(scripts["codefend"])


def command() -> Callable[[], object]:
    """The function that the ``codefend`` script calls; it reads ``sys.argv``."""
    module, _, name = entry_point().partition(":")
    function: Callable[[], object] = getattr(import_module(module), name)
    return function


def run(*arguments: object) -> Outcome:
    """Run ``codefend`` with these arguments in this process."""
    main, before = command(), sys.argv
    out, err = io.StringIO(), io.StringIO()
    sys.argv = ["codefend", *map(str, arguments)]
    try:
        with environment(COLUMNS="120"), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = main()
            except SystemExit as exit_:
                code = exit_.code
    finally:
        sys.argv = before
    return Outcome(code if isinstance(code, int) else 0, out.getvalue(), err.getvalue())


def run_well(*arguments: object) -> Outcome:
    """As ``run``; asserts that the command succeeds."""
    outcome = run(*arguments)
    assert outcome.code == 0, f"codefend {' '.join(map(str, arguments))}: {outcome.code}\n{outcome.err}"
    return outcome


@contextlib.contextmanager
def environment(**variables: str | None) -> Iterator[None]:
    """Set variables inside the block; None removes one."""
    before = {name: os.environ.get(name) for name in variables}
    try:
        for name, value in variables.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Float32 on one thread of the CPU, for the same sums in the same order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with environment(CODEFEND_PRECISION="float32", CODEFEND_DEVICE="cpu"):
            yield
    finally:
        torch.set_num_threads(threads)


# --- records ---------------------------------------------------------------------------------------------------------


def machine() -> dict[str, str]:
    """All that decides the last bits of float32 results: processor, instruction set, versions of libraries."""
    lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    flags = " ".join(flag for flag in sorted(cpu.get("flags", "").split()) if flag.startswith(("avx", "amx", "fma")))
    names = ("vendor_id", "cpu family", "model", "model name")
    return {
        "processor": " ".join(cpu.get(name, "") for name in names),
        "flags": flags,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def digest(array: NDArray[Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def save(name: str, record: object) -> None:
    """Write ``data/NAME.json``, sorted and indented, so that a change of behaviour is a small diff."""
    text = json.dumps(record, indent=1, sort_keys=True, ensure_ascii=False)
    (DATA / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def load(name: str) -> Any:
    return json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))


def save_arrays(name: str, arrays: Mapping[str, NDArray[Any]]) -> None:
    np.savez_compressed(DATA / f"{name}.npz", allow_pickle=False, **arrays)


def load_arrays(name: str) -> Arrays:
    with np.load(DATA / f"{name}.npz", allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def input_image(name: str = "input") -> NDArray[np.uint8]:
    """``[44, 36, 3]``, a corner of a scene under a perturbation of 8/255, or without one (``"clean"``)."""
    with Image.open(DATA / f"{name}.png") as image:
        return np.asarray(image.convert("RGB"))


# --- comparing -------------------------------------------------------------------------------------------------------


def differences(
    recorded: Any,
    current: Any,
    *,
    relative: float = RELATIVE,
    absolute: float = 1e-6,
    grow: bool = False,
    names: bool = False,
    at: str = "",
) -> list[str]:
    """Where ``current`` differs from ``recorded``: numbers by tolerance, all else exactly.

    With ``grow`` a mapping may have gained keys, with ``names`` a list of names more of them; nothing may be missing.
    """

    def inner(old: Any, new: Any, step: str) -> list[str]:
        return differences(old, new, relative=relative, absolute=absolute, grow=grow, names=names, at=at + step)

    if isinstance(recorded, Mapping) and isinstance(current, Mapping):
        changes = [] if grow else [f"{at}.{key}: is new" for key in current if key not in recorded]
        changes += [f"{at}.{key}: is missing" for key in recorded if key not in current]
        both = [key for key in recorded if key in current]
        return changes + [line for key in both for line in inner(recorded[key], current[key], f".{key}")]
    if isinstance(recorded, list) and isinstance(current, list):
        if names and all(isinstance(item, str) for item in recorded):
            return [f"{at}: {item!r} is missing" for item in recorded if item not in current]
        if len(recorded) == len(current):
            pairs = enumerate(zip(recorded, current, strict=True))
            return [line for number, (old, new) in pairs for line in inner(old, new, f"[{number}]")]
    if isinstance(recorded, float) and isinstance(current, int | float):
        same = math.isclose(recorded, current, rel_tol=relative, abs_tol=absolute)
    else:
        same = type(recorded) is type(current) and recorded == current
    return [] if same else [f"{at}: {recorded!r} became {current!r}"]
