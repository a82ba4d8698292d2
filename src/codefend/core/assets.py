"""What is installed: optional packages; weights, test sets and learned prompts in this package or codefend-models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from codefend.types import CodefendError

PACKAGE = Path(__file__).resolve().parents[1]
MODELS = "codefend_models"  # the distribution codefend-models: folders as in this package


@cache
def roots() -> tuple[Path, ...]:
    """The folders in which installed files lie; this package comes first."""
    spec = find_spec(MODELS)
    places = spec.submodule_search_locations if spec is not None else None
    return PACKAGE, *(Path(place) for place in places or ())


def find_asset(name: str) -> Path | None:
    """The file or folder ``name``, such as ``weights/pocket``; None where it is not installed."""
    return next((root / name for root in roots() if (root / name).exists()), None)


def asset(name: str) -> Path:
    """As `find_asset`. Raises CodefendError with the command that installs what is missing."""
    path = find_asset(name)
    if path is None:
        raise CodefendError(f"{name} is not installed: pip install 'codefend[models]'")
    return path


def assets(pattern: str) -> list[Path]:
    """Every installed file that matches ``pattern``, by name of its folder; one of this package hides one of models."""
    files = {path.relative_to(root): path for root in reversed(roots()) for path in root.glob(pattern)}
    return [files[name] for name in sorted(files)]


@contextmanager
def needs(purpose: str, extra: str) -> Iterator[None]:
    """Raise CodefendError for a package that an import in the block misses: ``purpose`` needs it, ``extra`` brings it.

    >>> with needs("drawing", "train"):
    ...     import no_such_package
    Traceback (most recent call last):
    codefend.types.CodefendError: drawing needs no_such_package: pip install 'codefend[train]'
    """
    try:
        yield
    except ImportError as error:
        raise CodefendError(f"{purpose} needs {error.name}: pip install 'codefend[{extra}]'") from error
