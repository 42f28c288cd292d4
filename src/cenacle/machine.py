"""What this machine is, as far as the operating system says without MLX.

Owns: the cores that this process may use, and the name of the processor.
Does not know: GPUs, memory, other machines.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path


def usable_cores() -> list[int]:
    """The cores that this process may use."""
    try:
        return sorted(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        return list(range(os.cpu_count() or 1))


def processor_name() -> str:
    """The processor's name, such as "AMD EPYC 9R14"."""
    if sys.platform == "darwin":  # never run
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
