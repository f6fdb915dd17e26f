"""`rtx` (TensorRT for RTX) and `trt` (TensorRT)."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from car_runtime.backends.spec import BackendSpec, Finding, MachineFacts
from car_runtime.errors import one_line
from car_runtime.system import packages

RTX_TARGETS = (75, 80, 86, 89, 120, 121)
"""Compute capabilities that TensorRT for RTX builds for: Turing, Ampere, Ada and Blackwell; Hopper (90) is none."""
_DRIVERS = {13: "580", 12: "525"}
"""CUDA's major version → the first NVIDIA driver (on Linux) that runs it."""


@dataclass(frozen=True)
class Flavour:
    """One of the two TensorRTs; its engines run on no other."""

    title: str
    module: str
    """Name of its Python module."""
    package: str


FLAVOURS = {
    "rtx": Flavour("TensorRT for RTX", "tensorrt_rtx", "tensorrt-rtx"),
    "trt": Flavour("TensorRT", "tensorrt", "tensorrt"),
}
"""Backend → what it runs on. A plan's engines name their flavour by the backend too."""

RTX = BackendSpec(
    name="rtx",
    device="gpu",
    rank=1,
    computes=("fp32", "fp16", "bf16"),
    needs_engines=True,
    extra="rtx",
    install=("pip install 'car-deploy[rtx]'",),
    opener="car_runtime.backends.tensorrt.backend:open_rtx",
    probe="car_runtime.backends.tensorrt.spec:probe",
    hardware="RTX cards from Turing to Blackwell, driver 580 or newer",
    status="built only",
)
TRT = BackendSpec(
    name="trt",
    device="gpu",
    rank=2,
    computes=("fp32", "fp16", "bf16"),
    needs_engines=True,
    extra="trt",
    install=("pip install 'car-deploy[trt]'  # libraries: from NVIDIA's index, see its TensorRT installation guide",),
    opener="car_runtime.backends.tensorrt.backend:open_trt",
    probe="car_runtime.backends.tensorrt.spec:probe",
    hardware="NVIDIA GPUs with classic TensorRT, such as A100 and H100",
    status="built only",
)


def probe(spec: BackendSpec, facts: MachineFacts) -> Finding:
    """TensorRT is there, and a GPU and driver that it runs on."""
    flavour, gpu = FLAVOURS[spec.name], facts.gpu
    if facts.packages[flavour.package] is None:
        return spec.missing(f"{flavour.package} is not installed")
    if not gpu.usable:
        return spec.missing(str(gpu.why), ())
    if spec.name == "rtx" and gpu.sm not in RTX_TARGETS:
        return spec.missing(
            f"TensorRT for RTX does not run on compute capability {gpu.capability}, only on RTX GPUs "
            f"({', '.join(f'sm{sm}' for sm in RTX_TARGETS)}); use trt or ort-cuda",
            TRT.install,
        )
    if problem := old_driver(flavour.package, str(gpu.driver)):
        return spec.missing(problem, ())
    version = facts.packages[flavour.package]
    return _try_runtime(spec, flavour.module) or Finding(
        usable=True, why=f"{flavour.package} {version} on {gpu.name}, engines for {gpu.target}"
    )


def old_driver(package: str, driver: str) -> str | None:
    """A driver whose CUDA is older than that of the package's libraries, which give no understandable error."""
    runs = int(driver.removeprefix("CUDA ").split(".")[0])
    made_for = [cuda for cuda in _DRIVERS if runs < cuda and packages.version(f"{package}-cu{cuda}") is not None]
    if not made_for:
        return None
    return (
        f"the NVIDIA driver runs {driver} at most, but {package} was made for CUDA {made_for[0]}; "
        f"upgrade the driver to {_DRIVERS[made_for[0]]} or newer"
    )


def _try_runtime(spec: BackendSpec, module: str) -> Finding | None:
    """Make the runtime object, which needs the driver."""
    try:
        trt = importlib.import_module(module)
        runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    except Exception as error:
        return spec.missing(f"{module} does not start: {one_line(error)}")
    return None if runtime is not None else spec.missing(f"{module} makes no runtime on this GPU and driver")
