"""Numbers that people give, checked."""

from __future__ import annotations

import numpy as np

from car_runtime.errors import RequestError


def integer(name: str, value: object, low: int, high: int, remedy: str) -> int:
    """A setting, Python's or numpy's, as an int of low…high. Raises RequestError."""
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not whole or not low <= int(value) <= high:  # type: ignore[call-overload]
        raise RequestError(f"{name} is {value!r}, but must be a whole number in {low}…{high}; {remedy}")
    return int(value)  # type: ignore[call-overload, no-any-return]


def number(name: str, value: object, low: float, high: float, remedy: str) -> float:
    """A setting, Python's or numpy's, as a float of low…high. Raises RequestError, for NaN too."""
    real = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if not real or not low <= value <= high:  # type: ignore[operator]
        raise RequestError(f"{name} is {value!r}, but must be a number in {low:g}…{high:g}; {remedy}")
    return float(value)  # type: ignore[arg-type]
