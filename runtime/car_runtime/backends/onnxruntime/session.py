"""Loading ONNX Runtime, of which two packages exist that overwrite each other."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata
from typing import Any

from car_runtime.backends.spec import BackendSpec
from car_runtime.errors import BackendError, one_line
from car_runtime.format.manifest import Precision


def import_onnxruntime(spec: BackendSpec, package: str, extras: Sequence[str]) -> Any:
    """The module, for a backend that needs `package`.

    `extras`: those that bring a package which would do. Raises BackendError with the remedy.
    """
    if all(_is_installed(name) for name in ("onnxruntime", "onnxruntime-gpu")):
        either = " or ".join(f"'car-deploy[{extra}]'" for extra in extras)
        raise BackendError(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other; "
            f"pip uninstall both, then install {either}"
        )
    try:
        import onnxruntime
    except Exception as error:
        raise BackendError(
            f"the backend {spec.name!r} needs {package} ({one_line(error)}); run: {spec.install[-1]}"
        ) from error
    return onnxruntime


def needless_optimizers(precision: Precision, graph: str) -> list[str]:
    """What a session of a graph on the CPU does without, for its argument `disabled_optimizers`.

    Folding would copy every matrix to transpose it, only for it to be packed in another form. Where weights are
    stored in half precision it has to be: else they would be converted in every run. So it has to in the decoder,
    where kernels are added to others. Of an int8 plan a product and the sum after it must not become one Gemm, which
    has no INT8 kernel: its matrix would be converted in every run.
    """
    if precision.weights == "int8":
        return ["MatMulAddFusion"]
    single = precision.compute == precision.weights == "fp32"
    return ["ConstantFolding"] if single and graph != "decoder" else []


def _is_installed(distribution: str) -> bool:
    try:
        metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True
