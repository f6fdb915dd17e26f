"""What runs the graphs: one small protocol, and the choice among the engines of this machine."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from car_runtime.errors import BackendError
from car_runtime.manifest import WEIGHTS, Manifest


class Buffer(Protocol):
    """Contiguous memory where the engine works: a numpy array on a CPU, a device pointer with a shape on a GPU."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the dimensions."""
        ...

    def __getitem__(self, rows: slice, /) -> Buffer:
        """A view of some rows of the first dimension, without copying."""
        ...

    def reshape(self, shape: tuple[int, ...], /) -> Buffer:
        """A view of the same elements in another shape, without copying."""
        ...


Mark = Any
"""A point in an engine's stream of work: a time on a CPU, an event on a GPU."""


class Backend(Protocol):
    """An opened plan on one engine. `run` may be called from several threads at once, on different buffers.

    A GPU works behind the caller's back: what is run, written and copied is done in that order, and only `read` and
    `seconds` wait for it.
    """

    name: str
    batches: tuple[int, ...]
    """How many pictures a step can make at once, ascending, from 1."""
    guided_only: bool
    """Whether steps always have 2B rows. A request without guidance then runs with cfg 0, for the same picture."""
    cache_dtype: str | None
    """What this backend keeps K and V in; None: what the plan's graphs have."""

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        """An uninitialised buffer; `dtype` is a numpy name."""
        ...

    def write(self, buffer: Buffer, values: NDArray[Any]) -> None:
        """Fill a whole buffer from an array of its shape and dtype."""
        ...

    def read(self, buffer: Buffer) -> NDArray[Any]:
        """A copy of a buffer as an array, when all work on it is done."""
        ...

    def copy(self, source: Buffer, target: Buffer) -> None:
        """Copy a whole buffer to another of its shape and dtype, where the engine works."""
        ...

    def copy_rows(self, source: Buffer, target: Buffer) -> None:
        """Copy [N, R, …] to [N, B, …], other memory: the first B of the R rows of each of the N entries."""
        ...

    def mark(self) -> Mark:
        """Now, in the order of the engine's work."""
        ...

    def seconds(self, begin: Mark, end: Mark) -> float:
        """Time from one mark to another; waits for `end`."""
        ...

    def step_graph(self, scale: int, batch: int) -> str:
        """Which graph makes this scale for so many pictures: the one with named dimensions, or a static form."""
        ...

    def run(self, graph: str, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        """Run a graph of the plan, writing its outputs in place. Raises RunError.

        Inputs that the graph does not have are left out, so that one loop feeds both forms of the step; outputs that
        nobody asks for are not given.
        """
        ...

    def report(self) -> dict[str, Any]:
        """Facts for people: engine and version, memory in bytes, and what the backend has to tell."""
        ...

    def close(self) -> None:
        """Let go of engines and memory. Closing twice does nothing."""
        ...


Opener = Callable[[Path, Manifest, "int | None"], Backend]


def _open_ort_cpu(root: Path, manifest: Manifest, threads: int | None) -> Backend:
    from car_runtime.backends.ort_cpu import OrtCpu

    return OrtCpu(root, manifest, threads)


def _open_openvino(root: Path, manifest: Manifest, threads: int | None) -> Backend:
    from car_runtime.backends.openvino import OpenVino

    return OpenVino(root, manifest, threads)


def _open_amx(root: Path, manifest: Manifest, threads: int | None) -> Backend:
    return _amx("Amx")(root, manifest, threads)


def _open_amx_fp32(root: Path, manifest: Manifest, threads: int | None) -> Backend:
    return _amx("AmxFp32")(root, manifest, threads)


def _amx(kind: str) -> Opener:
    try:
        from car_runtime.backends import amx
    except ImportError as error:
        raise BackendError(f"the backends for AMX can't be loaded here ({error}); use another") from error
    opener: Opener = getattr(amx, kind)
    return opener


def _open_ort_cuda(root: Path, manifest: Manifest, threads: int | None) -> Backend:
    from car_runtime.backends.ort_cuda import open_ort_cuda

    return open_ort_cuda(root, manifest, threads)


def _open_rtx(root: Path, manifest: Manifest, threads: int | None) -> Backend:
    from car_runtime.backends.tensorrt_engines import open_rtx

    return open_rtx(root, manifest, threads)


def _open_trt(root: Path, manifest: Manifest, threads: int | None) -> Backend:
    from car_runtime.backends.tensorrt_engines import open_trt

    return open_trt(root, manifest, threads)


LARGE = 256 * 1024 * 1024
"""Bytes of weights from which `auto` prefers OpenVINO in bfloat16 to ONNX Runtime in float32."""

# Best first: `auto` takes the first that opens (but see `_best_first`).
OPENERS: dict[str, Opener] = {
    "rtx": _open_rtx,
    "trt": _open_trt,
    "ort-cuda": _open_ort_cuda,
    "ort-cpu": _open_ort_cpu,
    "openvino": _open_openvino,
    "amx": _open_amx,
    "amx-fp32": _open_amx_fp32,
}


def check_name(name: str) -> None:
    """Raise BackendError unless `name` is "auto" or a backend of this version."""
    if name == "auto" or name in OPENERS:
        return
    have = ", ".join(["auto", *OPENERS])
    near = difflib.get_close_matches(name, OPENERS, n=1)
    raise BackendError(f"there is no backend {name!r}; use {near[0] if near else f'one of {have}'}")


def open_backend(name: str, root: Path, manifest: Manifest, threads: int | None = None) -> tuple[Backend, str]:
    """Open a plan and say why on this backend.

    A named backend opens or raises BackendError; only "auto" goes on to the next best. PlanError is never a reason to
    go on: a broken plan is broken everywhere.
    """
    check_name(name)
    if name != "auto":
        return OPENERS[name](root, manifest, threads), "asked for"
    passed_over: dict[str, list[str]] = {}  # reason → backends: several wait for the same thing
    for candidate in _best_first(manifest):
        try:
            backend = OPENERS[candidate](root, manifest, threads)
        except BackendError as error:
            passed_over.setdefault(str(error), []).append(candidate)
            continue
        facts = [f"not {reason.partition(';')[0]}" for reason in _reasons(passed_over)]
        return backend, "; ".join([f"auto: {candidate}, best that opens here", *facts])
    raise BackendError("no backend opens: " + "; ".join(_reasons(passed_over)))


def _best_first(manifest: Manifest) -> list[str]:
    """Names of all backends, best first for this plan on this machine.

    A large float32 plan takes `amx` or OpenVINO before ONNX Runtime where the CPU multiplies bfloat16: several times
    as fast at d16. A small one starts sooner on ONNX Runtime.
    """
    large = manifest.files[WEIGHTS].bytes >= LARGE and manifest.precision.compute == "fp32"
    if not large or not has_openvino_bfloat16():
        return list(OPENERS)
    on_cpu = ("amx", "openvino", "amx-fp32", "ort-cpu")
    return [*(name for name in OPENERS if name not in on_cpu), *on_cpu]


def has_openvino_bfloat16() -> bool:
    """Whether OpenVINO is installed and would multiply in bfloat16 on this CPU."""
    try:
        return "BF16" in openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    except Exception:
        return False


def openvino_core() -> Any:
    """A new `openvino.Core` that has loaded its CPU plugin. Raises what OpenVINO raises.

    The plugin is loaded on a thread that ends at once. On Linux it gives the thread that loads it a signal stack
    (sigaltstack), unmaps that when it is unloaded, and puts the earlier one back only on the same thread and if the
    plugins go in reverse order. A thread that lives on is left with a stack that is gone, and as Python's signal
    handlers run on it, the next Ctrl-C is a segmentation fault (OpenVINO 2026.4).
    """
    import openvino

    def load() -> Any:
        core = openvino.Core()
        # Of the CPU alone: to list all devices it would load its plugins for GPUs and NPUs too.
        core.get_property("CPU", "FULL_DEVICE_NAME")
        return core

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(load).result()


def _reasons(passed_over: Mapping[str, list[str]]) -> list[str]:
    return [f"{', '.join(names)}: {reason}" for reason, names in passed_over.items()]
