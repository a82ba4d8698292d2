"""Where the networks run and how wide their numbers are.

Networks stand on the default device and take images from any: what comes back lies where the images lay.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext

import torch

from codefend.types import CodefendError

VARIABLE = "CODEFEND_DEVICE"
PRECISION = "CODEFEND_PRECISION"  # float32: nothing in mixed precision, for figures that are the same on any machine


def default_device() -> torch.device:
    """The device that ``CODEFEND_DEVICE`` names ("cuda:1", "cpu", ...); without it a GPU if there is one, else the CPU.

    Raises CodefendError when it names none, or one that this machine hasn't.
    """
    name = os.environ.get(VARIABLE, "")
    if not name:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return device_named(name, f"{VARIABLE}={name}")


def device_named(name: str, said: str) -> torch.device:
    """The device ``name``, tried out. Raises CodefendError, which begins with ``said``, when this machine hasn't it."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises either for a device it wasn't built for
        reason = str(error).splitlines()[0]
        raise CodefendError(f"{said} is no device of this machine ({reason}); try cpu") from error
    return device


def precision(device: torch.device) -> str:
    """What pays there: "bfloat16" on a GPU or a CPU with units for it (AMX, AVX512-BF16), else "float32".

    A CPU without such units emulates bfloat16, tens of times slower than float32. ``CODEFEND_PRECISION=float32`` turns
    it off. Raises CodefendError when that is set to something else.
    """
    wanted = os.environ.get(PRECISION, "")
    if wanted not in ("", "float32"):
        raise CodefendError(f"{PRECISION}={wanted}: set it to float32, or not at all")
    units = device.type == "cuda" or (device.type == "cpu" and _multiplies_bfloat16())
    return "bfloat16" if units and not wanted else "float32"


def mixed_precision(device: torch.device) -> AbstractContextManager[None]:
    """Autocast to what pays there, for trainings and for purifying. Raises CodefendError as `precision`.

    Never for an attack that is judged: its gradients are exact in float32 only.
    """
    return torch.autocast(device.type, torch.bfloat16) if precision(device) == "bfloat16" else nullcontext()


def _multiplies_bfloat16() -> bool:
    names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")  # private, so they may be gone in another release
    probes = (getattr(torch.cpu, name, None) for name in names)
    return any(probe() for probe in probes if probe)
