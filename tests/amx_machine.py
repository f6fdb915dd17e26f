"""Whether this machine runs the backends for AMX."""

from __future__ import annotations

import shutil

import pytest

from car_runtime import BackendError
from car_runtime.backends import amx


def without_amx() -> str | None:
    """Why it doesn't."""
    try:
        amx.check_cpu()
    except BackendError as error:
        return str(error)
    return None if shutil.which("gcc") or shutil.which("clang") else "no C compiler"


needs_amx = pytest.mark.skipif(without_amx() is not None, reason=str(without_amx()))
