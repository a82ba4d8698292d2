"""Where the networks run and how wide their numbers are.

Networks stand on the default device and take images from any: what comes back lies where the images lay.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext

import torch

from codefend.types import UserError

VARIABLE = "CODEFEND_DEVICE"


def default_device() -> torch.device:
    """The device that ``CODEFEND_DEVICE`` names ("cuda:1", "cpu", ...); without it a GPU if there is one, else the CPU.

    Raises UserError when it names none, or one that this machine hasn't.
    """
    name = os.environ.get(VARIABLE, "")
    if not name:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return device_named(name, f"{VARIABLE}={name}")


def device_named(name: str, said: str) -> torch.device:
    """The device ``name``, tried out. Raises UserError, which begins with ``said``, when this machine hasn't it."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises either for a device it wasn't built for
        reason = str(error).splitlines()[0]
        raise UserError(f"{said} is no device of this machine ({reason}); try cpu") from error
    return device


def training_precision(device: torch.device) -> AbstractContextManager[None]:
    """Mixed precision where it pays: bfloat16 on a GPU or a CPU with AMX tiles, else float32.

    A CPU without such units emulates bfloat16, tens of times slower than float32. Never for an attack that is judged:
    its gradients are exact in float32 only.
    """
    amx = device.type == "cpu" and _has_amx()
    if device.type == "cuda" or amx:
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


def _has_amx() -> bool:
    probe = getattr(torch.cpu, "_is_amx_tile_supported", None)  # private, so it may be gone in another release
    return bool(probe and probe())
