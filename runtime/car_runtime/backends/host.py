"""What the engines that run on the CPU share: numpy arrays as buffers, and the machine's cores."""

from __future__ import annotations

import os
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from car_runtime.backends import Buffer, Mark


class HostMemory:
    """The part of a backend that handles buffers, for engines that work on numpy arrays in place."""

    batches: tuple[int, ...] = (1, 2, 3, 4)  # at d16 one guided picture's K/V cache is 270 MB in float32
    guided_only = False
    cache_dtype: str | None = None

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        """An uninitialised array; "bfloat16", which numpy has no name for, is kept as uint16."""
        array: NDArray[Any] = np.empty(shape, np.dtype("uint16" if dtype == "bfloat16" else dtype))
        return array

    def write(self, buffer: Buffer, values: NDArray[Any]) -> None:
        """Copy `values` into the array."""
        np.copyto(array_of(buffer), values, casting="no")

    def read(self, buffer: Buffer) -> NDArray[Any]:
        """A copy of the array."""
        copied: NDArray[Any] = array_of(buffer).copy()
        return copied

    def copy(self, source: Buffer, target: Buffer) -> None:
        """Copy one array to another."""
        np.copyto(array_of(target), array_of(source), casting="no")

    def copy_rows(self, source: Buffer, target: Buffer) -> None:
        """Copy the first rows of each entry of one array to another."""
        wanted = array_of(target)
        np.copyto(wanted, array_of(source)[:, : wanted.shape[1]], casting="no")

    def mark(self) -> Mark:
        """The time in seconds: a call returns when its work is done."""
        return perf_counter()

    def seconds(self, begin: Mark, end: Mark) -> float:
        """The difference."""
        return float(end - begin)


def array_of(buffer: Buffer) -> NDArray[Any]:
    """The array that a buffer of `HostMemory` is."""
    assert isinstance(buffer, np.ndarray)
    assert buffer.flags.c_contiguous
    return buffer


def available_cores() -> int:
    """Threads for the engine: its own choice (0, one per physical core) unless this process has fewer."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 0 if usable == os.cpu_count() else usable
