"""Which machine a benchmark runs on, and with what; see `benchmarks.harness.records` for where it is written."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("numpy", "torch", "onnxruntime", "onnxruntime-gpu", "openvino", "diffusers", "transformers")


def machine() -> dict[str, Any]:
    """Where and with what a benchmark runs; every value is JSON's own, what can't be found out is None.

    `cores`: those this process may use. `threads`: PyTorch's, if it is loaded. `ram`: bytes this process may use.
    `commit`: of this checkout, with a "+" if files differ from it.
    """
    return {
        "cpu": cpu_name(),
        "cores": cores(),
        "threads": _threads(),
        "ram": ram(),
        "gpu": gpu_name(),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
        "commit": commit(),
        "command": command_line(),
    }


def cpu_name() -> str | None:
    """The processor's model; on Linux as the kernel has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    found = {key.strip(): value.strip() for key, colon, value in (line.partition(":") for line in lines) if colon}
    if "model name" not in found:
        return platform.processor() or platform.machine() or None
    # Virtual machines hide the model's name but not its numbers.
    family, model = found.get("cpu family"), found.get("model")
    return found["model name"] + (f" (family {family}, model {model})" if family and model else "")


def cores() -> int:
    """Cores this process may use: its affinity, and no more than a container's share of time."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _control_group("cpu.max").partition(" ")
    if quota.isdigit() and period.isdigit() and int(period):
        allowed = min(allowed, max(1, math.ceil(int(quota) / int(period))))
    return allowed


def ram() -> int | None:
    """Bytes of memory this process may use: the machine's, and no more than a container's share."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
    limit = _control_group("memory.max")
    return min(total, int(limit)) if limit.isdigit() else total


def _control_group(name: str) -> str:
    try:
        return (Path("/sys/fs/cgroup") / name).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def gpu_name() -> str | None:
    """The first GPU that a loaded PyTorch sees; nothing is loaded to find out."""
    torch = sys.modules.get("torch")
    return torch.cuda.get_device_name(0) if torch is not None and torch.cuda.is_available() else None


def _threads() -> int | None:
    torch = sys.modules.get("torch")
    return torch.get_num_threads() if torch is not None else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The checkout's commit, 12 digits; None outside a checkout."""
    try:
        git = ["git", "-C", str(ROOT)]
        found = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip() + ("+" if changed.stdout.strip() else "")


def command_line() -> str:
    """The command as one would type it; absolute paths by their last part, which is all that others can use."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None and spec.name:
        program = ["python", "-m", spec.name.removesuffix(".__main__")]
    else:
        program = ["python", Path(sys.argv[0]).name]
    return shlex.join([*program, *(Path(a).name if os.path.isabs(a) else a for a in sys.argv[1:])])
