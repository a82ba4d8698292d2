"""A policy as a folder: ``policy.json``, a card, and ``model.safetensors`` for learned policies.

The ``policy.json`` of fixed text is what `save_policy` writes; that of a learned policy has a ``"kind"``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from codefend.core.checkpoints import load_checkpoint, save_checkpoint
from codefend.core.files import write_atomic
from codefend.prompts.policy import PromptPolicy, load_policy, save_policy
from codefend.types import CodefendError

if TYPE_CHECKING:
    from codefend.prompts.generator import GeneratedPolicy
    from codefend.prompts.soft import SoftPolicy
    from codefend.prompts.writer import Writer

    AnyPolicy = PromptPolicy | SoftPolicy | GeneratedPolicy


def save_folder(policy: AnyPolicy, folder: Path, card: str = "") -> Path:
    """Write ``policy`` into ``folder``; ``policy.json`` comes last, so that a folder with one is complete."""
    if card:
        write_atomic(folder / "README.md", card)
    if isinstance(policy, PromptPolicy):
        save_policy(policy, folder / "policy.json")
        return folder
    from codefend.prompts.generator import GeneratedPolicy

    settings: dict[str, Any] = {"name": policy.name, "key": policy.key}
    if isinstance(policy, GeneratedPolicy):
        values = {name: p.detach().half() for name, p in policy.writer.adapters().items()}
        rank = next(p.shape[0] for name, p in values.items() if "lora_A" in name)
        settings |= {"kind": "generator", "rank": rank, "tokens": policy.tokens, "place": policy.place}
        settings |= {"gate": policy.writer.gate_layers}
        save_checkpoint(folder / "model.safetensors", values)
    else:
        settings |= {"kind": "soft", "victim": policy.victim}
        save_checkpoint(folder / "model.safetensors", {"prefix": policy.prefix})
    write_atomic(folder / "policy.json", json.dumps(settings, indent=2) + "\n")
    return folder


def load_folder(folder: Path, *, writer: Writer | None = None) -> AnyPolicy:
    """Read what `save_folder` wrote. ``writer`` replaces the shipped language model of a generator.

    Raises CodefendError for a missing or damaged file, or an unknown kind.
    """
    path = folder / "policy.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise CodefendError(f"{folder} holds no prompt policy: cannot read policy.json ({reason})") from error
    kind = settings.get("kind") if isinstance(settings, dict) else None
    if kind is None:
        return load_policy(path)
    if kind not in ("soft", "generator"):
        raise CodefendError(f"{path}: unknown kind {kind!r}; known: soft, generator, or none for text")
    tensors, _ = load_checkpoint(folder / "model.safetensors")
    try:
        if kind == "soft":
            return _soft(settings, tensors)
        return _generator(settings, tensors, writer or language_model())
    except CodefendError:  # a ValueError: the language model is missing
        raise
    except (KeyError, ValueError, RuntimeError) as error:
        raise CodefendError(f"{folder} is damaged or was made by another version ({error})") from error


def _soft(settings: Any, tensors: Any) -> SoftPolicy:
    from codefend.prompts.soft import SoftPolicy

    return SoftPolicy(settings["name"], tensors["prefix"].float(), settings["victim"])


def _generator(settings: Any, tensors: Any, writer: Writer) -> GeneratedPolicy:
    from codefend.prompts.generator import GeneratedPolicy

    if settings["gate"]:
        writer.add_gate(int(settings["gate"]))
    for name, parameter in writer.add_lora(int(settings["rank"])).items():
        parameter.data.copy_(tensors[name])
    writer.freeze()
    place = settings.get("place", "before")
    return GeneratedPolicy(settings["name"], writer, int(settings["tokens"]), settings["key"], place)


def language_model() -> Writer:
    """The shipped small language model. Raises CodefendError when its packages are missing."""
    from codefend.prompts.writer import Writer
    from codefend.victims.smollm import load_smollm

    return Writer(*load_smollm())
