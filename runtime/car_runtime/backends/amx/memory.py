"""Memory for the kernels, and how they are called from Python."""

from __future__ import annotations

from ctypes import Structure, c_int, c_int64, c_size_t, c_void_p
from typing import Any

from numpy.typing import NDArray

LARGEST = 1 << 46
"""Bytes at once: more is none that a machine has, and none that overflows in the kernels."""


class PackedMatrix(Structure):
    """A packed matrix and its bias."""

    _fields_ = [("w", c_void_p), ("b", c_void_p), ("inputs", c_int64), ("outputs", c_int64)]


class Memory:
    """Zeroed memory of the kernel's, in huge pages where the system has them. MemoryError if there is none."""

    def __init__(self, library: Any, size: int) -> None:
        self.size, self._library = size, library
        given = library.car_allocate(size) if 0 < size <= LARGEST else None
        if not given:
            raise MemoryError(f"no {size:,} bytes for weights or activations")
        self.address = int(given)

    def __del__(self) -> None:
        if getattr(self, "address", None):
            self._library.car_free(self.address, self.size)


class Workspace:
    """Activations of one call after the other; grows to what the largest needs."""

    def __init__(self, library: Any) -> None:
        self._library = library
        self._memory: Memory | None = None

    def reserve(self, size: int) -> int:
        """The address of so many bytes."""
        if self._memory is None or self._memory.size < size:
            self._memory = None
            self._memory = Memory(self._library, size)
        return int(self._memory.address)


def declare(library: Any) -> None:
    """Say what the functions that all kernels share take and give."""
    library.car_allocate.argtypes, library.car_allocate.restype = [c_size_t], c_void_p
    library.car_free.argtypes, library.car_free.restype = [c_void_p, c_size_t], None
    library.car_pack.argtypes = [c_void_p, c_int64, c_int64, c_void_p, c_int64]
    library.car_pack.restype = None


def bf16_terms_of(library: Any) -> int:
    """Number of bf16 values whose sum stands for one float32 value."""
    return c_int.in_dll(library, "car_bf16_terms").value


def address(array: NDArray[Any]) -> int:
    """The address of an array's first element."""
    return array.ctypes.data
