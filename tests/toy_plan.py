"""A CAR plan exported from a toy with made-up weights, once for all tests that only look at a plan or run it."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

from benchmarks.subject import Subject, made_up


@cache
def folder() -> Path:
    """Where the benchmark keeps the toy's plan; gone when the tests are."""
    path = Path(tempfile.mkdtemp(prefix="toy-plan-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


@cache
def toy() -> Subject:
    return made_up("tiny", None, "fp32", (1, 2), folder(), lambda _: None)
