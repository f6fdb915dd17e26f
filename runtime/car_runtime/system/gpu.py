"""The NVIDIA GPU that a backend would use: found by cuda-python, and else described as nvidia-smi has it."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from typing import Any

from car_runtime.errors import BackendError, CarError, one_line

_INSUFFICIENT_DRIVER, _NO_DEVICE = 35, 100
_NO_DRIVER = (
    "there is no NVIDIA driver on this machine; install one from your distribution or from NVIDIA, "
    "or run on the CPU with --backend ort-cpu"
)
_SMI_SECONDS = 20.0
"""How long nvidia-smi may take."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """The GPU that is used, and the software that it is reached by."""

    name: str
    capability: tuple[int, int]
    """Compute capability, such as (8, 9)."""
    memory_bytes: int
    count: int
    """GPUs that this process sees. The first is used; CUDA_VISIBLE_DEVICES says which that is."""
    driver: str
    """Newest CUDA version that the driver runs, such as "13.0"."""
    runtime: str
    """CUDA version of cuda-python."""

    @property
    def target(self) -> str:
        """What engines for this GPU are called: "sm89"."""
        return f"sm{self.capability[0]}{self.capability[1]}"


@dataclass(frozen=True, kw_only=True)
class GpuFacts:
    """What could be found out about the GPU; what could not is None."""

    usable: bool = False
    """Whether CUDA works here."""
    why: str | None = None
    """What to do, where it doesn't."""
    name: str | None = None
    capability: str | None = None
    """Compute capability, such as "8.9"."""
    target: str | None = None
    """What engines for it are called: "sm89"."""
    memory: int | None = None
    """Bytes."""
    driver: str | None = None
    """Newest CUDA version that it runs, such as "CUDA 13.0"; from nvidia-smi: the driver's own version."""
    nvidia_smi: list[str] | None = None
    """nvidia-smi's lines, one per GPU; None: it is not installed."""

    @property
    def sm(self) -> int | None:
        """The target's number, such as 89."""
        return None if self.target is None else int(self.target.removeprefix("sm"))


def gpu_facts() -> GpuFacts:
    """The GPU that a backend would use. Raises nothing: that there is none is a finding, in `why`."""
    lines = _nvidia_smi()
    try:
        gpu = probe()
    except CarError as error:
        return replace(_by_nvidia_smi(lines), why=str(error), nvidia_smi=lines)
    except Exception as error:  # a driver that is broken in a way nobody foresaw is a finding, not a crash
        why = f"{type(error).__name__}: {one_line(error)}; check that nvidia-smi works"
        return GpuFacts(why=why, nvidia_smi=lines)
    return GpuFacts(
        usable=True,
        name=gpu.name,
        capability=".".join(map(str, gpu.capability)),
        target=gpu.target,
        memory=gpu.memory_bytes,
        driver=f"CUDA {gpu.driver}",
        nvidia_smi=lines,
    )


def probe() -> Gpu:
    """The GPU that a backend would use.

    Raises BackendError with the remedy: there is no driver, cuda-python is absent, the driver is too old, or sees no
    GPU. Without a driver that takes no time: nothing is imported.
    """
    if not has_driver():
        raise BackendError(_NO_DRIVER)
    runtime = import_runtime()
    made_for = _version(_call(runtime, "cudaRuntimeGetVersion"))
    driver_number = _call(runtime, "cudaDriverGetVersion")
    if driver_number == 0:
        raise BackendError(_NO_DRIVER)
    driver = _version(driver_number)
    status, count = runtime.cudaGetDeviceCount()
    code = int(status)
    if code == _NO_DEVICE or (code == 0 and not count):
        raise BackendError(
            f"the NVIDIA driver (CUDA {driver}) sees no GPU; check nvidia-smi and the variable CUDA_VISIBLE_DEVICES, "
            "or run on the CPU with --backend ort-cpu"
        )
    if code == _INSUFFICIENT_DRIVER:
        raise BackendError(
            f"the NVIDIA driver runs CUDA up to {driver}, but cuda-python was made for {made_for}; "
            f"upgrade the driver, or install cuda-python {driver.split('.')[0]}.*"
        )
    if code != 0:
        raise BackendError(f"CUDA does not start: {describe_status(runtime, status)}; check that nvidia-smi works")
    properties = _call(runtime, "cudaGetDeviceProperties", 0)
    name = properties.name.decode() if isinstance(properties.name, bytes) else str(properties.name)
    return Gpu(
        name=name.rstrip("\0"),
        capability=(int(properties.major), int(properties.minor)),
        memory_bytes=int(properties.totalGlobalMem),
        count=int(count),
        driver=driver,
        runtime=made_for,
    )


def has_driver() -> bool:
    """Whether the library of an NVIDIA driver is here."""
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True


def import_runtime() -> Any:
    """cuda-python's module of the CUDA runtime. Raises BackendError with the remedy."""
    try:
        from cuda.bindings import runtime
    except Exception as error:
        raise BackendError(
            f"the GPU backends need cuda-python ({one_line(error)}); "
            "run: pip install 'car-deploy[cuda]'; for other engines [rtx], [trt] or [gpu] brings it"
        ) from error
    return runtime


def _call(runtime: Any, name: str, *arguments: Any) -> Any:
    try:
        status, value = getattr(runtime, name)(*arguments)
    except Exception as error:
        raise BackendError(f"CUDA does not start: {name}: {one_line(error)}; check that nvidia-smi works") from error
    if int(status) != 0:
        why = describe_status(runtime, status)
        raise BackendError(f"CUDA does not start: {name}: {why}; check that nvidia-smi works")
    return value


def describe_status(runtime: Any, status: Any) -> str:
    """A status of the CUDA runtime, by name and in words."""
    _, words = runtime.cudaGetErrorString(status)
    words = words.decode() if isinstance(words, bytes) else words
    return f"{getattr(status, 'name', status)} ({words})"


def _version(number: int) -> str:
    """13020 is "13.2"."""
    return f"{number // 1000}.{number % 1000 // 10}"


def _nvidia_smi() -> list[str] | None:
    """One line per GPU: name, compute capability, memory, driver; None without nvidia-smi."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = "--query-gpu=name,compute_cap,memory.total,driver_version"
    try:
        done = subprocess.run(
            [program, query, "--format=csv,noheader"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_SMI_SECONDS,
        )
    except (OSError, subprocess.SubprocessError) as error:
        return [f"nvidia-smi does not run: {one_line(error)}"]
    lines = (done.stdout if done.returncode == 0 else done.stdout + done.stderr).splitlines()
    return [line.strip() for line in lines if line.strip()]


def _by_nvidia_smi(lines: list[str] | None) -> GpuFacts:
    """What nvidia-smi's first line says; nothing where it is no such line."""
    fields = [part.strip() for part in lines[0].split(",")] if lines else []
    if len(fields) != 4 or not fields[1].replace(".", "").isdigit():
        return GpuFacts()
    name, capability, _, driver = fields
    return GpuFacts(name=name, capability=capability, target=f"sm{capability.replace('.', '')}", driver=driver)
