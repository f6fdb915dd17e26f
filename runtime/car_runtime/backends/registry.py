"""The choice among the engines of this machine."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from pathlib import Path

from car_runtime.backends.base import Backend
from car_runtime.backends.openvino.core import openvino_core
from car_runtime.errors import BackendError
from car_runtime.format.manifest import WEIGHTS, Manifest

Opener = Callable[[Path, Manifest, "int | None"], Backend]


def _open_ort_cpu(root: Path, manifest: Manifest, threads: int | None) -> Backend:
    from car_runtime.backends.onnxruntime.cpu import OrtCpu

    return OrtCpu(root, manifest, threads)


def _open_openvino(root: Path, manifest: Manifest, threads: int | None) -> Backend:
    from car_runtime.backends.openvino.backend import OpenVino

    return OpenVino(root, manifest, threads)


def _open_amx(root: Path, manifest: Manifest, threads: int | None) -> Backend:
    return _amx("Amx")(root, manifest, threads)


def _open_amx_fp32(root: Path, manifest: Manifest, threads: int | None) -> Backend:
    return _amx("AmxFp32")(root, manifest, threads)


def _amx(kind: str) -> Opener:
    try:
        from car_runtime.backends.amx import backend as amx
    except ImportError as error:
        raise BackendError(f"the backends for AMX can't be loaded here ({error}); use another") from error
    opener: Opener = getattr(amx, kind)
    return opener


def _open_ort_cuda(root: Path, manifest: Manifest, threads: int | None) -> Backend:
    from car_runtime.backends.onnxruntime.cuda import open_ort_cuda

    return open_ort_cuda(root, manifest, threads)


def _open_rtx(root: Path, manifest: Manifest, threads: int | None) -> Backend:
    from car_runtime.backends.tensorrt.backend import open_rtx

    return open_rtx(root, manifest, threads)


def _open_trt(root: Path, manifest: Manifest, threads: int | None) -> Backend:
    from car_runtime.backends.tensorrt.backend import open_trt

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


def _reasons(passed_over: Mapping[str, list[str]]) -> list[str]:
    return [f"{', '.join(names)}: {reason}" for reason, names in passed_over.items()]
