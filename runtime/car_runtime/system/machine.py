"""One description of the machine, for every report that holds numbers measured on it."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

from car_runtime.system.cpu import control_group, cpu_flags, cpu_name, usable_cores
from car_runtime.system.gpu import GpuFacts, gpu_facts
from car_runtime.system.packages import installed


def machine(gpu: GpuFacts | None = None) -> dict[str, Any]:
    """Where this runs, as JSON. What the system doesn't say is None; memory is bytes.

    gpu: of `gpu_facts`, if that was asked already. `cores_usable`: those that this process may use. `flags`: the
    processor's, of `cpu.CPU_FLAGS`.
    """
    gpu = gpu_facts() if gpu is None else gpu
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "cores_usable": usable_cores(),
        "flags": cpu_flags(),
        **_memory(),
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "gpu": gpu.name,
        "driver": gpu.driver,
        "packages": installed(),
    }


def usable_memory() -> int | None:
    """Bytes of memory that this process may use: the machine's, and no more than its container's share."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
    limit = control_group("memory.max")
    return min(total, int(limit)) if limit.isdigit() else total


def _memory() -> dict[str, int | None]:
    total = available = None
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.endswith("kB")}
        total, available = kilobytes["MemTotal"] * 1024, kilobytes["MemAvailable"] * 1024
    except (OSError, ValueError, KeyError):
        pass
    return {"memory": total, "memory_available": available}
