"""Default device and precision of the networks.

Networks run on the default device and accept images from any device; the result is on the device of the images.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext

import torch

from codefend.types import CodefendError

VARIABLE = "CODEFEND_DEVICE"
PRECISION = "CODEFEND_PRECISION"  # "float32" turns mixed precision off, for reproducible results


def default_device() -> torch.device:
    """The device that ``CODEFEND_DEVICE`` names ("cuda:1", "cpu", ...); otherwise a GPU if there is one, else the CPU.

    Raises CodefendError for an unknown or unavailable device.
    """
    name = os.environ.get(VARIABLE, "")
    if not name:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return device_named(name, f"{VARIABLE}={name}")


def device_named(name: str, setting: str) -> torch.device:
    """The device ``name``, tested. Raises CodefendError, which names the ``setting``, when it is not available."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises either for a device it wasn't built for
        reason = str(error).splitlines()[0].partition(". ")[0]
        known = "device string" not in reason  # else it lists all device types there are
        because = f"this device is not available ({reason[:100]})" if known else "there is no such device"
        raise CodefendError(f"{setting}: {because}; use cpu") from error
    return device


def precision(device: torch.device) -> str:
    """The fastest precision: "bfloat16" on a GPU or a CPU that multiplies it (AMX, AVX512-BF16), else "float32".

    A CPU without these units emulates bfloat16, tens of times slower than float32. ``CODEFEND_PRECISION=float32``
    always selects float32. Raises CodefendError when the variable holds anything else.
    """
    setting = os.environ.get(PRECISION, "")
    if setting not in ("", "float32"):
        raise CodefendError(f"{PRECISION}={setting}: set it to float32 or unset it")
    units = device.type == "cuda" or (device.type == "cpu" and _multiplies_bfloat16())
    return "bfloat16" if units and not setting else "float32"


def mixed_precision(device: torch.device) -> AbstractContextManager[None]:
    """Autocast to `precision`, for training and purification. Raises CodefendError as `precision` does.

    Never use it in an attack that is evaluated: gradients are exact in float32 only.
    """
    return torch.autocast(device.type, torch.bfloat16) if precision(device) == "bfloat16" else nullcontext()


def _multiplies_bfloat16() -> bool:
    names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")  # private: another release may lack them
    probes = (getattr(torch.cpu, name, None) for name in names)
    return any(probe() for probe in probes if probe)
