"""Plans of depth 2 that several test files read, each exported once in a test run. Copy one before changing it."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

from car_export.plan import ExportOptions, build_plan
from small import small_model

KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "fp16": ({}, {"precision": "fp16", "batches": (1, 2)}),
    "fp32": ({"vocab": 4096, "control": False}, {}),
    "steered": ({}, {}),
    "bf16": ({"control": False}, {"precision": "bf16"}),
}
"""Kind → options of the model, options of the export.

fp32 has more codes than TensorRT's TopK returns; two kinds have no control branch. `steered`
is in float32 and has one.
"""


@functools.cache
def small_plan(kind: str) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="car-plans-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    model, options = KINDS[kind]
    return build_plan(
        small_model(depth=2, sides=(1, 2, 4), **model),
        ExportOptions(output=folder / f"{kind}.plan", name=f"small-{kind}", **options),
    )
