"""The error that every benchmark raises on purpose."""

from __future__ import annotations

from car_train.errors import UserError


class BenchmarkError(UserError, RuntimeError):
    """A measurement that can't be made, read or written; the message ends with the remedy."""
