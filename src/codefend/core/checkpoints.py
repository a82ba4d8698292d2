"""Checkpoints: tensors and a JSON state in one safetensors file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from codefend.core.files import write_atomic
from codefend.core.runs import Row, plain
from codefend.types import CodefendError

if TYPE_CHECKING:  # `codefend --help` must not import torch
    from torch import Tensor


def save_checkpoint(path: str | Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any] | None = None) -> None:
    """Write tensors and a JSON ``state`` as one safetensors file, atomically.

    The ``get_state()`` of a generator is stored as a tensor. Raises CodefendError when the path cannot be written.
    """
    from safetensors.torch import save

    stored: set[int] = set()
    owned: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        address = value.untyped_storage().data_ptr()
        owned[name] = (
            value.clone() if address in stored or value.storage_offset() else value
        )  # the format allows no shared memory
        stored.add(address)
    write_atomic(path, save(owned, metadata={"state": json.dumps(plain(state or {}))}))


def load_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], Row]:
    """Read what ``save_checkpoint`` wrote, on the CPU. Raises CodefendError when it is missing or damaged."""
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise CodefendError(f"no checkpoint at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            tensors = {name: file.get_tensor(name) for name in names}
            state = json.loads((file.metadata() or {}).get("state", "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise CodefendError(f"{path} is damaged ({error}); remove it to start over") from error
    return tensors, state


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, in float32 on the CPU.

    Raises CodefendError for values that are not finite, and what safetensors raises (OSError, SafetensorError).
    """
    from safetensors.torch import load_file

    tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
    if name := find_nonfinite(tensors):
        raise CodefendError(f"{path}: {name} holds NaN or infinity; train or download these weights again")
    return tensors


def find_nonfinite(tensors: Mapping[str, Tensor]) -> str:
    """The name of a tensor that holds NaN or infinity; "" where all are finite.

    Integers are finite, and tensors of the meta device and of 8 bits are not looked at.
    """
    for name, value in tensors.items():
        floats = value.is_floating_point() and value.element_size() > 1 and not value.is_meta
        if floats and value.numel() and not is_finite(value):
            return name
    return ""


def is_finite(values: Tensor) -> bool:
    """Whether all values are finite."""
    # NaN and infinity both reach an extreme; isfinite would write four tensors of this size on the way.
    low, high = values.aminmax()
    return bool(low.isfinite() & high.isfinite())


def cached_tensors(
    path: str | Path, state: Mapping[str, Any], make: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """The tensors in ``path`` if they were stored with this ``state``, else those of ``make``, which are stored there.

    With ``path`` "" nothing is stored. Raises CodefendError as `load_checkpoint` and `save_checkpoint` do.
    """
    if path and Path(path).exists():
        tensors, stored = load_checkpoint(path)
        if all(stored.get(key) == value for key, value in state.items()):
            return tensors
    tensors = make()
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        save_checkpoint(path, tensors, state)
    return tensors
