"""Any Transformers image-text-to-text model as a white-box victim: ``hf:ID_OR_FOLDER[:key=value,...]``."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from codefend.types import CodefendError

if TYPE_CHECKING:
    from codefend.victims.hf.victim import HFVictim

PREFIX = "hf:"


def load(spec: str) -> HFVictim:
    """Load ``hf:Qwen/Qwen2.5-VL-3B-Instruct:dtype=bfloat16,device=cuda`` (options: `loading.HFOptions`).

    Raises CodefendError for a missing package, an unknown model or option, or a model of another kind.
    """
    from codefend.core.settings import override, parse_settings

    rest = spec.removeprefix(PREFIX)
    parts = re.fullmatch(r"(.*):(\w+=.*)", rest)  # a device has a colon of its own, as in device=cuda:1
    name, tail = parts.groups() if parts else (rest, "")
    if not name:
        raise CodefendError("name a model, as in hf:HuggingFaceTB/SmolVLM-256M-Instruct or hf:./folder")
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise CodefendError("hf: victims need Transformers; install it with `pip install codefend[hf]`") from error
    from codefend.victims.hf.loading import HFOptions, load_victim

    options = override(HFOptions(), parse_settings([item for item in tail.split(",") if item]))
    return load_victim(name, options)
