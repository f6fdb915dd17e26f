"""The backends of this version, and the choice among them.

    python -m car_runtime.backends.registry     README's table of backends

A new backend is a folder with a `spec.py` and a class of the protocol in `base.py`, and one line in `BACKENDS`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path

from car_runtime.backends.amx.spec import AMX, AMX_FP32
from car_runtime.backends.base import Backend
from car_runtime.backends.onnxruntime.spec import CUDA, ORT_CPU, ORT_CUDA
from car_runtime.backends.openvino.core import has_bfloat16
from car_runtime.backends.openvino.spec import OPENVINO
from car_runtime.backends.spec import BackendSpec
from car_runtime.backends.tensorrt.spec import RTX, TRT
from car_runtime.errors import BackendError
from car_runtime.format.folder import PlanFolder
from car_runtime.format.manifest import WEIGHTS, Manifest

BACKENDS: dict[str, BackendSpec] = {
    spec.name: spec for spec in (ORT_CPU, OPENVINO, AMX, AMX_FP32, CUDA, ORT_CUDA, RTX, TRT)
}
"""Name → spec, in the order in which they are listed for people; `by_rank` is that of `auto`."""
LARGE = 256 * 1024 * 1024
"""Bytes of weights from which `auto` prefers bfloat16 on a CPU to ONNX Runtime in float32."""


def by_rank() -> list[str]:
    """Names of all backends, best first."""
    return sorted(BACKENDS, key=lambda name: BACKENDS[name].rank)


def on_cpu(name: str) -> bool:
    """Whether this is a backend of the CPU."""
    return name in BACKENDS and BACKENDS[name].device == "cpu"


def check_name(name: str) -> None:
    """Raise BackendError unless `name` is "auto" or a backend of this version."""
    if isinstance(name, str) and (name == "auto" or name in BACKENDS):
        return
    have = ", ".join(["auto", *by_rank()])
    near = difflib.get_close_matches(str(name), by_rank(), n=1)
    raise BackendError(f"there is no backend {name!r}; use {near[0] if near else f'one of {have}'}")


def open_backend(
    name: str,
    root: Path,
    manifest: Manifest,
    threads: int | None = None,
    folder: PlanFolder | None = None,
    trust_engines: bool = False,
) -> tuple[Backend, str]:
    """Open a plan and say why on this backend.

    A named backend opens or raises BackendError; only "auto" goes on to the next best. PlanError is never a reason to
    go on: a broken plan is broken everywhere.
    """
    check_name(name)
    if name != "auto":
        return BACKENDS[name].open(root, manifest, threads, folder, trust_engines), "asked for"
    passed_over: dict[str, list[str]] = {}  # reason → backends: several wait for the same thing
    for candidate in best_first(manifest):
        try:
            backend = BACKENDS[candidate].open(root, manifest, threads, folder, trust_engines)
        except BackendError as error:
            passed_over.setdefault(str(error), []).append(candidate)
            continue
        facts = [f"not {reason.partition(';')[0]}" for reason in _reasons(passed_over)]
        return backend, "; ".join([f"auto: {candidate}, best that opens here", *facts])
    raise BackendError("no backend opens: " + "; ".join(_reasons(passed_over)))


def best_first(manifest: Manifest) -> list[str]:
    """Names of all backends, best first for this plan on this machine.

    A large float32 plan takes `amx` or OpenVINO before ONNX Runtime where the CPU multiplies bfloat16: several times
    as fast at d16. A small one starts sooner on ONNX Runtime.
    """
    large = manifest.files[WEIGHTS].bytes >= LARGE and manifest.precision.compute == "fp32"
    if not large or not has_bfloat16():
        return by_rank()
    return sorted(BACKENDS, key=lambda name: BACKENDS[name].rank_bf16 or BACKENDS[name].rank)


def markdown_table(package: str = ".") -> str:
    """README's table of backends. `package`: what pip installs, by default the checkout."""
    lines = ["| backend | runs on | precisions | install | status |", "|---|---|---|---|---|"]
    for spec in BACKENDS.values():
        precisions = ", ".join([*spec.computes, *(["int8"] if spec.int8 else [])])
        lines.append(
            f"| `{spec.name}` | {spec.hardware} | {precisions} | `pip install '{package}[{spec.extra}]'` "
            f"| {spec.status} |"
        )
    return "\n".join(lines)


def _reasons(passed_over: Mapping[str, list[str]]) -> list[str]:
    return [f"{', '.join(names)}: {reason}" for reason, names in passed_over.items()]


if __name__ == "__main__":
    print(markdown_table())
