"""A process that keeps freed memory does not get it from the system page by page again."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource
from codefend.core.processes import keep_freed_memory

if {kept}:
    keep_freed_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    bytearray(64 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(kept: bool) -> int:
    command = [sys.executable, "-c", SCRIPT.format(kept=kept)]
    return int(subprocess.check_output(command, env={"PYTHONPATH": ":".join(sys.path)}))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_used_again() -> None:
    assert faults(kept=True) < faults(kept=False) / 5
