"""Which machine a benchmark runs on, and with what; see `benchmarks.harness.records` for where it is written."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from car_runtime.system.cpu import cpu_name, usable_cores
from car_runtime.system.machine import usable_memory
from car_runtime.system.packages import version

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("numpy", "torch", "onnxruntime", "onnxruntime-gpu", "openvino", "diffusers", "transformers")


def machine() -> dict[str, Any]:
    """Where and with what a benchmark runs; every value is JSON's own, what can't be found out is None.

    `cores`: those this process may use. `threads`: PyTorch's, if it is loaded. `ram`: bytes this process may use.
    `commit`: of this checkout, with a "+" if files differ from it.
    """
    return {
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "threads": _threads(),
        "ram": usable_memory(),
        "gpu": gpu_name(),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "commit": commit(),
        "command": command_line(),
    }


def gpu_name() -> str | None:
    """The first GPU that a loaded PyTorch sees; nothing is loaded to find out."""
    torch = sys.modules.get("torch")
    return torch.cuda.get_device_name(0) if torch is not None and torch.cuda.is_available() else None


def _threads() -> int | None:
    torch = sys.modules.get("torch")
    return torch.get_num_threads() if torch is not None else None


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
