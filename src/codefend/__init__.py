"""CoDefend removes adversarial perturbations from images before a multimodal LLM sees them, and evaluates the defense.

Images are float32 ``[B, 3, H, W]``, RGB, in ``[0, 1]``; `attack` takes radii in these units (``8 / 255``),
`EvalConfig` in 1/255 (l-inf: ``8``).

- `purify` cleans one image: a path, PIL image, array or tensor.
- `load_purifier`, `load_victim`, `load_task` load by name; `Defense` and `DefendedVictim` put a purifier in front of a
  model; the result is a victim like any other.
- `attack` makes adversarial images; `evaluate` with an `EvalConfig` measures defenses under a grid of attacks;
  `certify` gives an answer with the l2 radius inside which no attack changes it.
- `text` reads text in images, marks what reads like an instruction, and redacts or quotes it.
- `wrap` returns an OpenAI or Anthropic client whose images are purified before they leave the process.
- `CodefendError`, a ValueError, is raised for input that the caller can correct.

``import codefend`` is light: it imports neither torch nor any model library before a name is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from codefend.attacks import attack
    from codefend.bench import EvalConfig, evaluate
    from codefend.bench.smoothing import certify
    from codefend.defense import DefendedVictim, Defense, StraightThrough
    from codefend.gateway.client import wrap
    from codefend.prompts import image_text as text
    from codefend.purifiers import load as load_purifier
    from codefend.purifiers.base import Purifier
    from codefend.purifiers.single import purify
    from codefend.tasks import load as load_task
    from codefend.types import Budget, CodefendError, Example, Task
    from codefend.victims import load as load_victim

__version__ = "0.1.0"

_LAZY = {
    "purify": ("codefend.purifiers.single", "purify"),
    "load_purifier": ("codefend.purifiers", "load"),
    "load_victim": ("codefend.victims", "load"),
    "load_task": ("codefend.tasks", "load"),
    "attack": ("codefend.attacks", "attack"),
    "evaluate": ("codefend.bench", "evaluate"),
    "EvalConfig": ("codefend.bench", "EvalConfig"),
    "certify": ("codefend.bench.smoothing", "certify"),
    "Purifier": ("codefend.purifiers.base", "Purifier"),
    "Defense": ("codefend.defense", "Defense"),
    "DefendedVictim": ("codefend.defense", "DefendedVictim"),
    "StraightThrough": ("codefend.defense", "StraightThrough"),
    "text": ("codefend.prompts", "image_text"),
    "wrap": ("codefend.gateway.client", "wrap"),
    "Budget": ("codefend.types", "Budget"),
    "Example": ("codefend.types", "Example"),
    "Task": ("codefend.types", "Task"),
    "CodefendError": ("codefend.types", "CodefendError"),
    "UserError": ("codefend.types", "CodefendError"),  # its name until 2026-11
}

__all__ = [
    "Budget",
    "CodefendError",
    "DefendedVictim",
    "Defense",
    "EvalConfig",
    "Example",
    "Purifier",
    "StraightThrough",
    "Task",
    "__version__",
    "attack",
    "certify",
    "evaluate",
    "load_purifier",
    "load_task",
    "load_victim",
    "purify",
    "text",
    "wrap",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        module, attribute = _LAZY[name]
        if name == "text":  # a module
            return import_module(f"{module}.{attribute}")
        return getattr(import_module(module), attribute)
    raise AttributeError(f"module 'codefend' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
