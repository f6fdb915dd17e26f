"""The kernels as a library for this machine: compiled once by its C compiler and kept in ~/.cache/car.

What is loaded is code. A library is taken from there only if nobody but its user (or root) can have put it there.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from car_runtime.errors import BackendError, one_line
from car_runtime.system import cpu
from car_runtime.system.files import replacing
from car_runtime.system.ownership import is_closed, is_ours

SOURCES = [Path(__file__).with_name(name) for name in ("tiles.h", "tiles.c", "step.c", "convnet.c")]
ROOT = Path("~/.cache/car/native")
FLAGS = ["-O3", "-march=x86-64-v4", "-mamx-tile", "-mamx-bf16", "-mavx512bf16", "-fopenmp", "-fPIC", "-shared"]
CPU_FLAGS = ("amx_tile", "amx_bf16", "avx512_bf16")
"""What the code needs, as /proc/cpuinfo names it."""
_SECONDS = 120


def check_cpu(name: str = "amx") -> None:
    """Raise BackendError unless this CPU multiplies bfloat16 in tiles, and the system is one that the code is for."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise BackendError(f"the backend {name!r} is for Linux on x86-64; use another backend")
    flags = cpu.cpu_flags() or []
    missing = [flag for flag in CPU_FLAGS if flag not in flags]
    if missing:
        raise BackendError(f"this CPU has no {', '.join(missing)}, which {name!r} needs; use another backend")


def load(bf16_terms: int = 1) -> Any:
    """The library, compiled now if this machine hasn't yet. BackendError with the remedy.

    `bf16_terms`: how many bf16 values stand for a number, 1 or 2.
    """
    flags = [*FLAGS, f"-DBF16_TERMS={bf16_terms}"]
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    sources = [source.read_bytes() for source in SOURCES]
    kept = _kept(hashlib.sha256(b"\0".join([*sources, *map(str.encode, flags)])).hexdigest()[:16])
    if not is_ours(kept):
        if compiler is None:
            raise BackendError(
                "the backend 'amx' is compiled on this machine, which has no C compiler; "
                "install gcc 11 or newer (apt install gcc), or use --backend openvino"
            )
        _compile([*shlex.split(compiler), *flags], kept)
    try:
        library = ctypes.CDLL(str(kept))
    except OSError as error:
        raise BackendError(f"{kept} can't be loaded ({one_line(error)}); delete it to compile it again") from error
    refused = library.car_start()
    if refused:
        raise BackendError(f"the system keeps AMX from this process ({os.strerror(refused)}); use --backend openvino")
    return library


def _kept(key: str) -> Path:
    """Where the library is kept: in ROOT, or for this process alone where others could write to that."""
    try:
        folder = ROOT.expanduser()
    except RuntimeError:  # nobody's home
        return _private_folder() / f"kernels-{key}.so"
    try:
        for made in (folder.parent, folder):
            made.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise BackendError(
            f"the kernels can't be kept in {folder} ({one_line(error)}); "
            "set HOME to a folder that can be written to, or use --backend openvino"
        ) from error
    return (folder if is_closed(folder) else _private_folder()) / f"kernels-{key}.so"


@cache
def _private_folder() -> Path:
    folder = tempfile.mkdtemp(prefix="car-native-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _compile(compiler: list[str], output: Path) -> None:
    """Write the library next to its place and rename it, so that nobody loads half of one."""
    try:
        with replacing(output) as made:
            sources = [str(source) for source in SOURCES if source.suffix == ".c"]
            subprocess.run(
                [*compiler, *sources, "-o", str(made), "-lm"],
                check=True,
                capture_output=True,
                text=True,
                timeout=_SECONDS,
            )
            made.chmod(0o700)
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        raise BackendError(
            f"{compiler[0]} can't compile the kernels into {output.parent} ({said[0] if said else error}); "
            "it needs gcc 11 or clang 12 with OpenMP, or newer; set CC to one, or use --backend openvino"
        ) from error
