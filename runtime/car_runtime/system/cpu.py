"""The processor: its name, which vector extensions it has, and how many cores this process may use."""

from __future__ import annotations

import math
import os
import platform
from pathlib import Path

CPU_FLAGS = (
    *("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_bf16", "amx_int8", "asimd", "sve"),
)
"""The extensions that decide how fast a backend is, as /proc/cpuinfo names them."""


def cpu_info() -> dict[str, str]:
    """/proc/cpuinfo of the last processor; empty where there is no such file."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return {}
    return {key.strip(): value.strip() for key, colon, value in (line.partition(":") for line in lines) if colon}


def cpu_name() -> str | None:
    """The processor's model; None where the system doesn't say."""
    found = cpu_info()
    name = found.get("model name")
    if name is None:
        return platform.processor() or platform.machine() or None
    # Virtual machines hide the model's name but not its numbers.
    family, model = found.get("cpu family"), found.get("model")
    return name + (f" (family {family}, model {model})" if family and model else "")


def cpu_flags() -> list[str] | None:
    """Those of `CPU_FLAGS` that the processor has; None where the system doesn't say."""
    found = cpu_info()
    listed = found.get("flags") or found.get("Features")
    return None if listed is None else [flag for flag in CPU_FLAGS if flag in listed.split()]


def usable_cores() -> int:
    """Logical cores that this process may use: its affinity, and no more than its container's share of time."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = control_group("cpu.max").partition(" ")
    if quota.isdigit() and period.isdigit() and int(period):
        allowed = min(allowed, max(1, math.ceil(int(quota) / int(period))))
    return allowed


def engine_threads() -> int:
    """Threads for an engine: its own choice (0, one per physical core) unless this process has fewer cores."""
    usable = usable_cores()
    return 0 if usable == os.cpu_count() else usable


def physical_cores() -> int:
    """Physical cores of Linux that this process may use; two threads of a core count once."""
    usable = os.sched_getaffinity(0)
    siblings = [Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings") for cpu in usable]
    try:
        return len({file.read_text(encoding="ascii") for file in siblings})
    except OSError:
        return len(usable)


def control_group(name: str) -> str:
    """A file of this process's control group (version 2); empty where there is none."""
    try:
        return (Path("/sys/fs/cgroup") / name).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""
