"""A plan's parameters in a GPU's memory, as the kernels read them: matrices, inputs first; vectors; constants.

Shapes: C width, K inputs, N outputs. What is fp16 here is bf16 for a plan in that.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from car_runtime.backends.cuda.buffers import DeviceArray, Memory
from car_runtime.format.parameters import Parameters, UnsupportedGraphError

GRAIN = 16
"""Rows of matrices are multiples of so many elements, which lets the kernels load 16 bytes at a time."""


class Weights(Protocol):
    """Where parameters lie, by their names in the plan's table: addresses."""

    def matrix(self, name: str, K: int, N: int) -> int:
        """fp16 [K, N rounded up to 16], zeros from N on; in the model [N, K]."""
        ...

    def vector(self, name: str, size: int) -> int:
        """fp16 [size rounded up to 16]."""
        ...

    def neighbours(self, name: str, C: int) -> int:
        """A 3×3 convolution's kernel as a matrix: fp16 [9·C, C], tap after tap."""
        ...

    def floats(self, name: str, *shape: int) -> int:
        """float32, as the model has it."""
        ...

    def rows(self, name: str, number: int, C: int) -> int:
        """fp16 [number, C], as the model has it."""
        ...

    def conv(self, name: str, N: int, K: int, reach: int) -> int:
        """A convolution's kernel as a matrix: fp16 [reach² · K, N], tap after tap, K and N rounded up to 16."""
        ...

    def parts(self, name: str, number: int, C: int) -> int:
        """A 1×1 convolution's kernel from C to number · C channels, or its bias.

        fp16 [C, number · C] or [number · C], each C rounded up to 16.
        """
        ...

    def numbers(self, values: NDArray[np.int32]) -> int:
        """Whole numbers that the kernels look up."""
        ...

    def constant(self, name: str, values: NDArray[Any]) -> int:
        """What is no parameter, always the same under a name."""
        ...


class DeviceWeights:
    """Parameters that are copied to the device when they are first asked for."""

    def __init__(self, parameters: Parameters, memory: Memory, half: str = "fp16") -> None:
        self._parameters, self._memory = parameters, memory
        self._bf16 = half == "bf16"
        self._arrays: dict[tuple[str, str], DeviceArray] = {}

    def matrix(self, name: str, K: int, N: int) -> int:
        """See `Weights`. Plans in half precision store it so: it is copied as it lies."""
        return self._put("matrix", name, lambda: _padded(self._half(name, N, K).T))

    def vector(self, name: str, size: int) -> int:
        """See `Weights`."""
        return self._put("vector", name, lambda: _padded(self._half(name, size)))

    def neighbours(self, name: str, C: int) -> int:
        """See `Weights`."""
        return self._put("matrix", name, lambda: self._half(name, C, C, 3, 3).transpose(2, 3, 1, 0).reshape(9 * C, C))

    def floats(self, name: str, *shape: int) -> int:
        """See `Weights`."""
        return self._put("floats", name, lambda: self._view(name, "float32", *shape))

    def rows(self, name: str, number: int, C: int) -> int:
        """See `Weights`."""
        return self._put("rows", name, lambda: self._half(name, number, C))

    def conv(self, name: str, N: int, K: int, reach: int) -> int:
        """See `Weights`."""

        def matrix() -> NDArray[Any]:
            taps = self._half(name, N, K, reach, reach).transpose(2, 3, 1, 0)
            return _grown(taps, 2, 3).reshape(reach * reach * padded(K), padded(N))

        return self._put("conv", name, matrix)

    def parts(self, name: str, number: int, C: int) -> int:
        """See `Weights`."""

        def parts() -> NDArray[Any]:
            if name.endswith("bias"):
                return _grown(self._half(name, number * C).reshape(number, C), 1).reshape(-1)
            matrices = self._half(name, number * C, C, 1, 1).reshape(number, C, C).transpose(2, 0, 1)
            return _grown(matrices, 0, 2).reshape(padded(C), number * padded(C))

        return self._put("parts", name, parts)

    def numbers(self, values: NDArray[np.int32]) -> int:
        """See `Weights`."""
        return self._put("numbers", f"{values.shape} {values.tobytes().hex()}", lambda: values)

    def constant(self, name: str, values: NDArray[Any]) -> int:
        """See `Weights`."""
        return self._put("constant", name, lambda: values)

    def _half(self, name: str, *shape: int) -> NDArray[Any]:
        return self._parameters.bits(name, *shape) if self._bf16 else self._view(name, "float16", *shape)

    def _view(self, name: str, dtype: str, *shape: int) -> NDArray[Any]:
        values = self._parameters.view(name, *shape)
        if values.dtype != dtype:
            raise UnsupportedGraphError(f"{name} is stored as {values.dtype} where {dtype} is wanted")
        return values

    def _put(self, kind: str, name: str, make: Any) -> int:
        if (kind, name) not in self._arrays:
            values = np.ascontiguousarray(make())
            dtype = "bfloat16" if values.dtype == np.uint16 else values.dtype.name
            array = self._memory.allocate(values.shape, dtype)
            self._memory.write(array, values)
            self._arrays[kind, name] = array
        return self._arrays[kind, name].address


def padded(size: int) -> int:
    """`size` rounded up to `GRAIN`."""
    return -(-size // GRAIN) * GRAIN


def _padded(values: NDArray[Any]) -> NDArray[Any]:
    """Zeros after the last axis, up to `padded`."""
    return _grown(values, values.ndim - 1)


def _grown(values: NDArray[Any], *axes: int) -> NDArray[Any]:
    """Zeros after some axes, up to `padded`."""
    missing = [padded(size) - size if axis in axes else 0 for axis, size in enumerate(values.shape)]
    return np.pad(values, [(0, more) for more in missing]) if any(missing) else values
