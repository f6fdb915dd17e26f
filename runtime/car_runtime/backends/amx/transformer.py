"""A step's transformer in machine code for this CPU (`step.c`): weights packed once, then scale after scale.

Shapes: R rows, N tokens of a scale, P of the past, C width, H heads, V codes, B images, S side of a scale.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from ctypes import POINTER, Structure, byref, c_double, c_int64, c_void_p
from typing import Any

import numpy as np
from numpy.typing import NDArray

from car_runtime.backends.amx.description import Block, Floats, Fusion, Linear, UnsupportedGraphError
from car_runtime.backends.amx.description import Transformer as TransformerGraph
from car_runtime.backends.amx.memory import Memory, PackedMatrix, Workspace, address, bf16_terms_of, declare

Arrays = Mapping[str, NDArray[Any]]
_PANEL = 64
"""Columns that a kernel multiplies at once."""


class _Block(Structure):
    _fields_ = [
        *((name, PackedMatrix) for name in ("qkv", "proj", "fc1", "fc2")),
        ("temperature", c_void_p),
        ("modulation", c_int64),
        ("layer", c_int64),
    ]


class _Fusion(Structure):
    _fields_ = [("linear", PackedMatrix), ("weight", c_void_p), ("bias", c_void_p)]


class _Model(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("width", "heads", "vocab", "depth", "branch_depth")),
        *((name, c_int64) for name in ("modulation_rows", "threads")),
        ("eps", c_double),
        ("base", POINTER(_Block)),
        ("branch", POINTER(_Block)),
        ("fusions", POINTER(_Fusion)),
        ("inject", PackedMatrix),
        ("head", PackedMatrix),
    ]


class _Call(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("rows", "images", "side", "past")),
        *((name, c_void_p) for name in ("x", "modulation", "control", "position")),
        ("guidance", c_double),
        *((name, c_void_p) for name in ("past_k", "past_v", "new_k", "new_v")),
        ("logits", c_void_p),
        ("workspace", c_void_p),
    ]


class Transformer:
    """Packed weights, ready to run. Threads may run it at once, each with a `Workspace` of its own."""

    def __init__(self, library: Any, step: TransformerGraph, threads: int) -> None:
        """`library`: `build.load`. Weights are packed by `threads` threads: 2 bytes each, or 4 as two bf16 terms."""
        _declare(library)
        self._library = library
        self._bytes = 2 * bf16_terms_of(library)
        self._keep: list[Floats] = []
        blocks = [*step.base, *step.branch]
        linears = [one for block in blocks for one in (block.qkv, block.proj, block.fc1, block.fc2)]
        linears += [fusion.linear for fusion in step.fusions] + [step.head]
        linears += [step.inject] if step.inject is not None else []
        for linear in linears:
            outputs, inputs = linear.matrix.shape
            if not outputs or not inputs or outputs % _PANEL or inputs % 32:
                raise UnsupportedGraphError(
                    f"a matrix of {outputs} × {inputs}: they have to be multiples of 64 and 32"
                )
        self._weights = Memory(library, sum(self._bytes * linear.matrix.size for linear in linears))
        self._filled, self._threads = 0, threads
        base, branch = ((_Block * max(len(some), 1))(*map(self._block, some)) for some in (step.base, step.branch))
        fusions = (_Fusion * max(len(step.fusions), 1))(*map(self._fusion, step.fusions))
        self._model = _Model(
            width=step.width,
            heads=step.heads,
            vocab=len(step.head.matrix),
            depth=len(step.base),
            branch_depth=len(step.branch),
            modulation_rows=step.modulation_rows,
            threads=threads,
            eps=step.eps,
            base=base,
            branch=branch,
            fusions=fusions,
            inject=self._pack(step.inject) if step.inject is not None else PackedMatrix(),
            head=self._pack(step.head),
        )
        self._layers = len(blocks)

    @property
    def cache_dtype(self) -> type[np.generic]:
        """The dtype of keys and values: float32, or uint16 for bf16 values."""
        return np.uint16 if self._bytes == 2 else np.float32

    def run(self, inputs: Arrays, outputs: Arrays, workspace: Workspace) -> None:
        """One scale: `inputs` and `outputs` as a plan's step has them, K and V in `cache_dtype`.

        outputs: `logits` f32 [B, S, S, V], and `new_k_i`, `new_v_i` [N, R, H, d] of each layer. ValueError if an
        array has another shape or type than the others want.
        """
        x, logits = inputs["x"], outputs["logits"]
        keys, values = ([inputs[f"past_{kind}_{i}"] for i in range(self._layers)] for kind in "kv")
        new_keys, new_values = ([outputs[f"new_{kind}_{i}"] for i in range(self._layers)] for kind in "kv")
        control = inputs["control"] if self._model.branch_depth else None
        R, S, *_ = x.shape
        C, H, past = self._model.width, self._model.heads, len(keys[0])
        _check(x, (R, S, S, C))
        _check(inputs["modulation"], (R, self._model.modulation_rows, C))
        _check(inputs["pos"], (S, S, C))
        if control is not None:
            _check(control, (S, S, C))
        _check(logits, (min(len(logits), R), S, S, self._model.vocab))
        for array in (*keys, *values):
            _check(array, (past, R, H, C // H), self.cache_dtype)
        for array in (*new_keys, *new_values):
            _check(array, (S * S, R, H, C // H), self.cache_dtype)
        call = _Call(
            rows=R,
            images=len(logits),
            side=S,
            past=past,
            x=address(x),
            modulation=address(inputs["modulation"]),
            control=None if control is None else address(control),
            position=address(inputs["pos"]),
            guidance=float(inputs["cfg"][0]) * float(inputs["cfg_ratio"][0]),
            past_k=ctypes.cast(_addresses(keys), c_void_p),
            past_v=ctypes.cast(_addresses(values), c_void_p),
            new_k=ctypes.cast(_addresses(new_keys), c_void_p),
            new_v=ctypes.cast(_addresses(new_values), c_void_p),
            logits=address(logits),
        )
        size = self._library.car_workspace(byref(self._model), byref(call))
        if size < 0:
            raise ValueError(f"{R} rows of {S} × {S} tokens after {past}: the kernels don't have such a size")
        call.workspace = workspace.reserve(size)
        self._library.car_scale(byref(self._model), byref(call))

    def _pack(self, linear: Linear) -> PackedMatrix:
        outputs, inputs = linear.matrix.shape
        matrix = np.ascontiguousarray(linear.matrix, np.float32)
        packed = self._weights.address + self._filled
        self._library.car_pack(address(matrix), outputs, inputs, packed, self._threads)
        self._filled += self._bytes * matrix.size
        return PackedMatrix(w=packed, b=self._kept(linear.bias), inputs=inputs, outputs=outputs)

    def _block(self, block: Block) -> _Block:
        products = {name: self._pack(getattr(block, name)) for name in ("qkv", "proj", "fc1", "fc2")}
        temperature = self._kept(block.temperature)
        return _Block(**products, temperature=temperature, modulation=block.modulation, layer=block.layer)

    def _fusion(self, fusion: Fusion) -> _Fusion:
        weight, bias = self._kept(fusion.weight), self._kept(fusion.bias)
        return _Fusion(linear=self._pack(fusion.linear), weight=weight, bias=bias)

    def _kept(self, values: Floats) -> int:
        array = np.array(values, np.float32)  # a copy: the file's pages are given back
        self._keep.append(array)
        return address(array)


def _declare(library: Any) -> None:
    declare(library)
    library.car_workspace.argtypes, library.car_workspace.restype = [POINTER(_Model), POINTER(_Call)], c_int64
    library.car_scale.argtypes, library.car_scale.restype = [POINTER(_Model), POINTER(_Call)], None


def _addresses(arrays: Sequence[NDArray[Any]]) -> Any:
    return (c_void_p * len(arrays))(*map(address, arrays))


def _check(array: NDArray[Any], shape: tuple[int, ...], dtype: Any = np.float32) -> None:
    if array.shape != shape or array.dtype != dtype or not array.flags.c_contiguous:
        raise ValueError(f"an array {array.dtype} {array.shape} where {np.dtype(dtype)} {shape} is wanted")
