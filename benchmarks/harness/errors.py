"""The error that every benchmark raises on purpose."""

from __future__ import annotations


class BenchmarkError(RuntimeError):
    """A measurement that can't be made, read or written; the message ends with the remedy."""
