"""Loading ONNX Runtime, of which two packages exist that overwrite each other."""

from __future__ import annotations

from importlib import metadata
from typing import Any

from car_runtime.errors import BackendError, one_line


def import_onnxruntime(backend: str, package: str, extra: str, either: str) -> Any:
    """The module, for a backend that needs `package`, which comes with `extra`.

    `either`: what to install where both packages are. Raises BackendError with the remedy.
    """
    if all(_is_installed(name) for name in ("onnxruntime", "onnxruntime-gpu")):
        raise BackendError(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other; "
            f"pip uninstall both, then install {either}"
        )
    try:
        import onnxruntime
    except Exception as error:
        raise BackendError(
            f"the backend {backend!r} needs {package} ({one_line(error)}); run: pip install 'car-deploy[{extra}]'"
        ) from error
    return onnxruntime


def _is_installed(distribution: str) -> bool:
    try:
        metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True
