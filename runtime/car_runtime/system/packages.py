"""Installed distributions that decide what can run here."""

from __future__ import annotations

from importlib import metadata

PACKAGES = (
    *("numpy", "pillow", "onnxruntime", "onnxruntime-gpu", "openvino"),
    *("cuda-python", "tensorrt-rtx", "tensorrt", "torch"),
)


def installed() -> dict[str, str | None]:
    """Version of each of `PACKAGES`; None: not installed."""
    return {name: version(name) for name in PACKAGES}


def version(name: str) -> str | None:
    """The version of one distribution; None: not installed."""
    # Classic TensorRT goes by the CUDA version too.
    names = (name, f"{name}-cu13", f"{name}-cu12") if name == "tensorrt" else (name,)
    found = (distribution.version for candidate in names for distribution in metadata.distributions(name=candidate))
    return next(found, None)
