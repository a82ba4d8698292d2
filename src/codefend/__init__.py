"""CoDefend: keep multimodal LLMs honest when someone has tampered with the picture.

The front door is lazy: ``import codefend`` imports neither torch nor any model library.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from codefend.defense import DefendedVictim, Defense, StraightThrough
    from codefend.gateway.client import wrap
    from codefend.purifiers import load as load_purifier
    from codefend.tasks import load as load_task
    from codefend.types import Budget, CodefendError, Example, Task
    from codefend.victims import load as load_victim

__version__ = "0.1.0"

_LAZY = {
    "load_purifier": ("codefend.purifiers", "load"),
    "load_victim": ("codefend.victims", "load"),
    "load_task": ("codefend.tasks", "load"),
    "Defense": ("codefend.defense", "Defense"),
    "DefendedVictim": ("codefend.defense", "DefendedVictim"),
    "StraightThrough": ("codefend.defense", "StraightThrough"),
    "wrap": ("codefend.gateway.client", "wrap"),
    "Budget": ("codefend.types", "Budget"),
    "Example": ("codefend.types", "Example"),
    "Task": ("codefend.types", "Task"),
    "CodefendError": ("codefend.types", "CodefendError"),
}

__all__ = [
    "Budget",
    "CodefendError",
    "DefendedVictim",
    "Defense",
    "Example",
    "StraightThrough",
    "Task",
    "__version__",
    "load_purifier",
    "load_task",
    "load_victim",
    "wrap",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        module, attribute = _LAZY[name]
        return getattr(import_module(module), attribute)
    raise AttributeError(f"module 'codefend' has no attribute {name!r}")
