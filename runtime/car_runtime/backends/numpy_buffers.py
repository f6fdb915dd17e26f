"""What the engines that run on the CPU share: numpy arrays as buffers, and care for the pages of mapped weights."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from car_runtime.backends.base import Buffer, Mark, T

_DONT_NEED = 4
"""MADV_DONTNEED of madvise(2)."""


class NumpyBuffers:
    """The part of a backend that handles buffers, for engines that work on numpy arrays in place."""

    batches: tuple[int, ...] = (1, 2, 3, 4)  # at d16 one guided image's K/V cache is 270 MB in float32
    guided_only = False
    max_mixed: int | None = None
    cache_dtype: str | None = None

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        """An uninitialised array; "bfloat16", which numpy has no name for, is kept as uint16."""
        array: NDArray[Any] = np.empty(shape, np.dtype("uint16" if dtype == "bfloat16" else dtype))
        return array

    def constant(self, values: NDArray[Any], dtype: str) -> Buffer:
        """The array itself, unless it lies at an odd address: what is mapped takes no memory of its own."""
        array: NDArray[Any] = np.require(values, requirements=["C", "A"])
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

    def copy_rows(self, source: Buffer, target: Buffer, rows: Sequence[int] | None = None) -> None:
        """Copy some rows of each entry of one array to another."""
        wanted, given = array_of(target), array_of(source)
        if rows is None:
            np.copyto(wanted, given[:, : wanted.shape[1]], casting="no")
        else:
            for to, row in enumerate(rows):
                np.copyto(wanted[:, to], given[:, row], casting="no")

    def repeated(self, owner: object, key: Hashable, work: Callable[[], T]) -> T:
        """Nothing is recorded."""
        return work()

    def mark(self) -> Mark:
        """The time in seconds: a call returns when its work is done."""
        return perf_counter()

    def seconds(self, begin: Mark, end: Mark) -> float:
        """Seconds between two marks."""
        return float(end - begin)


def array_of(buffer: Buffer) -> NDArray[Any]:
    """The array that a buffer of `NumpyBuffers` is."""
    assert isinstance(buffer, np.ndarray)
    assert buffer.flags.c_contiguous
    return buffer


@contextmanager
def pages_forgotten(file: Path) -> Iterator[None]:
    """Do something that reads a mapped file once, and `forget_pages` of it meanwhile and at the end.

    So the process never holds the whole file and also what an engine makes of it.
    """
    done = Event()

    def forget() -> None:
        while not done.wait(0.05):
            forget_pages(file)

    thread = Thread(target=forget, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        forget_pages(file)


def forget_pages(file: Path) -> None:
    """Give back the memory that a mapped file takes in this process; what is read again comes from the file again.

    Engines map `weights.bin`, read it once and keep what they made of it: half of an opened d16 was such pages. Linux
    alone says what is mapped; elsewhere nothing happens, and the system takes the pages when it needs them.
    """
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    libc, name = ctypes.CDLL(None), str(file.resolve())
    for line in lines:
        addresses, access, *_ = line.split(maxsplit=5)
        if line.endswith(name) and "w" not in access:
            first, end = (int(address, 16) for address in addresses.split("-"))
            libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), _DONT_NEED)
