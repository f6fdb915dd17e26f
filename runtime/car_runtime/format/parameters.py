"""A plan's weights by name: entries of a checked manifest, and parameters for backends with kernels of their own.

A table says where in `weights.bin` each parameter lies. It may be a stranger's: every entry is checked before a view
is made, and every view has the shape that its user asks for. Nothing of a graph is read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from car_runtime.format.folder import PlanFolder, map_file
from car_runtime.format.manifest import WEIGHTS, Manifest
from car_runtime.format.schema import Parameter, Tensor

DTYPES: dict[str, np.dtype[Any]] = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2")}
"""What a parameter can be stored in, if the kernels are to read it."""
BITS = {"bfloat16": np.dtype("<u2")}
"""What numpy lacks, and shows as its bits to kernels that ask for it."""
LAYOUTS = ("plain", "transposed")
DIMENSIONS = 4
"""No parameter has more."""


class UnsupportedGraphError(Exception):
    """The plan isn't what a backend's own kernels can run; says what was looked for."""


class Entry(Protocol):
    """Where a parameter lies: bytes of `weights.bin`, little-endian."""

    @property
    def dtype(self) -> str:
        """numpy's name."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """As it is stored."""
        ...

    @property
    def offset(self) -> int:
        """Of its first byte."""
        ...

    @property
    def bytes(self) -> int:
        """How many it has."""
        ...

    @property
    def layout(self) -> str:
        """ "plain", or "transposed": a matrix whose rows are stored as columns."""
        ...


class Parameters:
    """Views of a plan's weights by name."""

    def __init__(self, table: Mapping[str, Entry], weights: Path, prefix: str = "") -> None:
        """`weights`: the file that the entries lie in. `prefix`: stands before every name that is asked for."""
        self._table, self._weights, self._prefix = table, weights, prefix
        self._size = weights.stat().st_size

    def under(self, prefix: str) -> Parameters:
        """The same, of one module: `under("base.").view("head.bias", …)`."""
        return Parameters(self._table, self._weights, self._prefix + prefix)

    def has(self, name: str) -> bool:
        """Whether there is a parameter of this name."""
        return self._prefix + name in self._table

    def numbers(self, pattern: str) -> int:
        """How many parameters `pattern` names, with 0, 1, … in place of its {}."""
        return next(i for i in range(len(self._table) + 1) if not self.has(pattern.format(i)))

    def view(self, name: str, *shape: int | None) -> NDArray[Any]:
        """A parameter as the model has it, mapped and not read; None: a dimension of any size.

        UnsupportedGraphError if there is none, its entry doesn't fit the file, or its shape isn't this one.
        """
        return self._shaped(name, DTYPES, shape)

    def bits(self, name: str, *shape: int | None) -> NDArray[np.uint16]:
        """The same of a parameter in bfloat16: its bits."""
        return self._shaped(name, BITS, shape)

    def _shaped(self, name: str, dtypes: Mapping[str, np.dtype[Any]], shape: tuple[int | None, ...]) -> NDArray[Any]:
        name = self._prefix + name
        entry = self._table.get(name)
        if entry is None:
            raise UnsupportedGraphError(f"the plan's table has no parameter {name}")
        stored = self._mapped(name, entry, dtypes)
        values: NDArray[Any] = stored.T if entry.layout == "transposed" else stored
        fits = len(values.shape) == len(shape) and all(
            want in (None, got) for want, got in zip(shape, values.shape, strict=True)
        )
        if not fits:
            wanted = " × ".join("any" if size is None else str(size) for size in shape)
            raise UnsupportedGraphError(f"{name} is {list(values.shape)} where {wanted} is wanted")
        return values

    def _mapped(self, name: str, entry: Entry, dtypes: Mapping[str, np.dtype[Any]]) -> NDArray[Any]:
        dtype = dtypes.get(entry.dtype)
        if dtype is None or entry.layout not in LAYOUTS:
            raise UnsupportedGraphError(f"{name} is stored as {entry.dtype}, {entry.layout}")
        whole = all(type(size) is int and size > 0 for size in entry.shape)
        if not whole or len(entry.shape) > DIMENSIONS or (entry.layout == "transposed" and len(entry.shape) != 2):
            raise UnsupportedGraphError(f"{name} is stored {entry.layout} as {list(entry.shape)}")
        size = math.prod(entry.shape) * dtype.itemsize
        inside = 0 <= entry.offset <= self._size - size and entry.offset % dtype.itemsize == 0
        if entry.bytes != size or not inside:
            raise UnsupportedGraphError(
                f"{name} has {entry.bytes} bytes at {entry.offset} of {self._weights.name}'s {self._size}, "
                f"but {list(entry.shape)} of {entry.dtype} need {size}"
            )
        mapped: NDArray[Any] = np.memmap(self._weights, dtype, "r", entry.offset, entry.shape)
        return mapped


def stored_arrays(folder: PlanFolder, entries: Mapping[str, Tensor | Parameter]) -> dict[str, NDArray[np.generic]]:
    """Arrays as `weights.bin` holds them, mapped and not read; bfloat16, which numpy lacks, as uint16.

    entries: of the manifest, which has checked them.
    """
    weights = np.frombuffer(map_file(folder, WEIGHTS), np.uint8) if entries else np.empty(0, np.uint8)
    return {
        name: weights[entry.offset : entry.offset + entry.bytes]
        .view(np.dtype("uint16" if entry.dtype == "bfloat16" else entry.dtype).newbyteorder("<"))
        .reshape(entry.shape)
        for name, entry in entries.items()
    }


def plan_parameters(manifest: Manifest, root: Path) -> Parameters:
    """All parameters of a plan of format 2 in the folder `root`.

    UnsupportedGraphError with the remedy if it has no table, or one that was written with other graphs.
    """
    problem = manifest.table_problem
    if problem is not None:
        raise UnsupportedGraphError(problem)
    return Parameters(manifest.parameters, root / WEIGHTS)
