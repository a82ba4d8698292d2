"""Any Transformers image-text-to-text model as a white-box victim: ``hf:ID_OR_FOLDER[:key=value,...]``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from codefend.core.assets import needs
from codefend.types import CodefendError

if TYPE_CHECKING:
    from codefend.victims.hf.victim import HFVictim

PREFIX = "hf:"


def load(spec: str) -> HFVictim:
    """Load ``hf:Qwen/Qwen2.5-VL-3B-Instruct:dtype=bfloat16,device=cuda`` (options: `loading.HFOptions`).

    Raises CodefendError for a missing package, an unknown model or option, or a model of another kind.
    """
    from codefend.core.settings import override
    from codefend.core.specs import parse_spec

    model = parse_spec(spec.removeprefix(PREFIX))
    if not model.name:
        raise CodefendError("name a model, as in hf:HuggingFaceTB/SmolVLM-256M-Instruct or hf:./folder")
    with needs("an hf: victim", "hf"):
        import transformers  # noqa: F401
    from codefend.victims.hf.loading import HFOptions, load_victim

    options = override(HFOptions(), model.options)
    return load_victim(model.name, options)
