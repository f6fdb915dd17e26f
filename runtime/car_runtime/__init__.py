"""Run an exported CAR or VAR model: a control image and a class in, an image out, without PyTorch.

    import car_runtime

    with car_runtime.open_plan("d16.plan") as plan:
        result = plan.generate("depth.png", label="golden retriever", seed=7, n=4)
    result.images  # uint8 [4, 256, 256, 3]

CAR: controllable autoregressive modeling, arXiv 2410.04671. VAR: visual autoregressive modeling, arXiv 2404.02905.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from car_runtime.errors import (
    BackendError,
    CarError,
    ImageError,
    OutputError,
    PlanError,
    RequestError,
    RunError,
    UserError,
)

if TYPE_CHECKING:
    from car_runtime.config import GenerationConfig
    from car_runtime.pipeline import CARPipeline
    from car_runtime.plan import Plan, Result, ScaleResult, default_plan, open_plan

__version__ = "0.2.0"
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # ONNX Runtime looks at it when it is first imported

__all__ = [
    "BackendError",
    "CARPipeline",
    "CarError",
    "GenerationConfig",
    "ImageError",
    "OutputError",
    "Plan",
    "PlanError",
    "RequestError",
    "Result",
    "RunError",
    "ScaleResult",
    "UserError",
    "__version__",
    "default_plan",
    "open_plan",
]


_LAZY = {"GenerationConfig": "car_runtime.config", "CARPipeline": "car_runtime.pipeline"}
_LAZY |= dict.fromkeys(("Plan", "Result", "ScaleResult", "default_plan", "open_plan"), "car_runtime.plan")


def __getattr__(name: str) -> Any:
    """Load what needs numpy and Pillow when it is first named: the exporter imports the schema alone."""
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'car_runtime' has no attribute {name!r}")
