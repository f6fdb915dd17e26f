"""Bases and branches in machine code for this CPU (`step.c`): weights packed once, then scale after scale.

Shapes: R rows, N tokens of a scale, P of the past, C width, H heads, V codes, B images, S side of a scale; m branches
mixed in before h blocks.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from ctypes import POINTER, Structure, byref, c_double, c_int64, c_void_p
from typing import Any

import numpy as np
from numpy.typing import NDArray

from car_runtime.backends.amx.description import (
    Block,
    Floats,
    Fusion,
    Linear,
    UnsupportedGraphError,
)
from car_runtime.backends.amx.description import Transformer as TransformerGraph
from car_runtime.backends.amx.memory import Memory, PackedMatrix, Workspace, address, bf16_terms_of, declare

Arrays = Mapping[str, NDArray[Any]]
_PANEL = 64
"""Columns that a kernel multiplies at once."""


_KINDS = ("concat", "zero", "cross_norm")


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
        *((name, c_int64) for name in ("width", "heads", "depth", "layers", "modulation_rows", "fused", "threads")),
        ("eps", c_double),
        ("blocks", POINTER(_Block)),
        ("inject", PackedMatrix),
        ("head", PackedMatrix),
    ]


class _Call(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("rows", "images", "side", "past")),
        *((name, c_void_p) for name in ("x", "modulation", "position")),
        *((name, c_void_p) for name in ("past_k", "past_v", "new_k", "new_v")),
        ("workspace", c_void_p),
        *((name, c_void_p) for name in ("control", "image", "fused_c")),
        *((name, c_int64) for name in ("mixed", "kind")),
        *((name, c_void_p) for name in ("c", "mix", "keep")),
        ("fusions", POINTER(_Fusion)),
        *((name, c_void_p) for name in ("guidance", "control_guidance", "twin", "plain", "logits")),
    ]


class _Packed:
    """Weights as the kernels multiply them: 2 bytes each, or 4 as two bf16 terms; packed by `threads` threads."""

    def __init__(self, library: Any, linears: Sequence[Linear | None], threads: int) -> None:
        """`linears`: all that will be packed. UnsupportedGraphError for other sizes than the kernels have."""
        self.library, self.threads = library, threads
        self.bytes = 2 * bf16_terms_of(library)
        self._keep: list[Floats] = []
        sizes = [linear.matrix.shape for linear in linears if linear is not None]
        for outputs, inputs in sizes:
            if not outputs or not inputs or outputs % _PANEL or inputs % 32:
                raise UnsupportedGraphError(
                    f"a matrix of {outputs} × {inputs}: they have to be multiples of 64 and 32"
                )
        total = sum(self.bytes * outputs * inputs for outputs, inputs in sizes)
        self._weights = Memory(library, total) if total else None
        self._filled = 0

    def pack(self, linear: Linear | None) -> PackedMatrix:
        if linear is None or self._weights is None:
            return PackedMatrix()
        outputs, inputs = linear.matrix.shape
        matrix = np.ascontiguousarray(linear.matrix, np.float32)
        packed = self._weights.address + self._filled
        self.library.car_pack(address(matrix), outputs, inputs, packed, self.threads)
        self._filled += self.bytes * matrix.size
        return PackedMatrix(w=packed, b=self.kept(linear.bias), inputs=inputs, outputs=outputs)

    def kept(self, values: Floats | None) -> int | None:
        if values is None:
            return None
        array = np.array(values, np.float32)  # a copy: the file's pages are given back
        self._keep.append(array)
        return address(array)


class PackedFusions:
    """The fusions of m branches, [m, h]."""

    def __init__(self, library: Any, fusions: Sequence[Fusion], mixed: int, width: int, threads: int) -> None:
        """`fusions`: branch after branch. UnsupportedGraphError unless they are all of one kind and of this width."""
        _declare(library)
        self.mixed, self.kind = mixed, _KINDS.index(fusions[0].kind)
        for fusion in fusions:
            if _shapes(fusion) != _shapes_of(fusions[0].kind, width):
                raise UnsupportedGraphError(f"a fusion of the kind {fusion.kind} and of shapes {_shapes(fusion)}")
        self._packed = packed = _Packed(library, [fusion.linear for fusion in fusions], threads)
        made = [
            _Fusion(linear=packed.pack(one.linear), weight=packed.kept(one.weight), bias=packed.kept(one.bias))
            for one in fusions
        ]
        self.array = (_Fusion * len(made))(*made)


def _shapes(fusion: Fusion) -> tuple[tuple[int, ...] | None, ...]:
    """Of a fusion's matrix, its bias, and its weight and bias of the norm."""
    linear = fusion.linear
    product = (None, None) if linear is None else (linear.matrix, linear.bias)
    return tuple(None if array is None else array.shape for array in (*product, fusion.weight, fusion.bias))


def _shapes_of(kind: str, C: int) -> tuple[tuple[int, ...] | None, ...]:
    return {
        "concat": ((C, 2 * C), (C,), (2 * C,), (2 * C,)),
        "zero": ((C, C), (C,), None, None),
        "cross_norm": (None, None, (C,), None),
    }[kind]


class Transformer:
    """A base or a branch, ready to run. Threads may run it at once, each with a `Workspace` of its own."""

    def __init__(self, library: Any, described: TransformerGraph, threads: int) -> None:
        """`library`: `build.load`. Weights are packed by `threads` threads."""
        _declare(library)
        self._library = library
        linears = [one for block in described.blocks for one in (block.qkv, block.proj, block.fc1, block.fc2)]
        self._packed = _Packed(library, [*linears, described.inject, described.head], threads)
        self._model = _Model(
            width=described.width,
            heads=described.heads,
            depth=len(described.blocks),
            layers=described.layers,
            modulation_rows=described.modulation_rows,
            fused=described.fused,
            threads=threads,
            eps=described.eps,
            blocks=(_Block * len(described.blocks))(*map(self._block, described.blocks)),
            inject=self._packed.pack(described.inject),
            head=self._packed.pack(described.head),
        )

    @property
    def cache_dtype(self) -> type[np.generic]:
        """The dtype of keys and values: float32, or uint16 for bf16 values."""
        return np.uint16 if self._packed.bytes == 2 else np.float32

    def run_step(
        self, inputs: Arrays, outputs: Arrays, workspace: Workspace, fusions: PackedFusions | None = None
    ) -> None:
        """One scale of a base: `inputs` and `outputs` as a step of format 2 has them, K and V in `cache_dtype`.

        inputs: without `plain` and `control_cfg` nothing is guided by the control; `c`, `mix` and `keep` belong to
        `fusions`, without which no branch is mixed in. outputs: `logits` f32 [B, S, S, V], and `new_k_i`, `new_v_i`
        [N, R, H, d] of each layer. ValueError if an array has another shape or type than the others want.
        """
        logits, ratio = outputs["logits"], float(inputs["cfg_ratio"][0])
        R, S, *_ = inputs["x"].shape
        B, C, h, mixed = len(logits), self._model.width, self._model.fused, 0 if fusions is None else fusions.mixed
        call, kept = self._call(inputs, outputs)
        twin, plain = inputs["twin"], inputs.get("plain", inputs["twin"])
        guidance = (inputs["cfg"] * np.float64(ratio)).astype(np.float32)
        steering = inputs.get("control_cfg")
        by_control = (np.zeros(B) if steering is None else steering * np.float64(ratio)).astype(np.float32)
        kept += [guidance, by_control]
        for one in (guidance, by_control):
            _check(one, (B,))
        for rows in (twin, plain):
            _check(rows, (B,), np.int64)
        _check(logits, (B, S, S, self._model.head.outputs))
        if h:
            keep = inputs["keep"] if mixed or "keep" in inputs else np.ones(R, np.float32)
            kept.append(keep)
            _check(keep, (R,))
            call.keep = address(keep)
        if fusions is not None:
            _check(inputs["c"], (mixed, h, S, S, R, C))
            _check(inputs["mix"], (mixed, R))
            if len(fusions.array) != mixed * h:
                raise ValueError(f"{len(fusions.array)} fusions, but {mixed} × {h} are wanted")
            call.mixed, call.kind, call.fusions = mixed, fusions.kind, fusions.array
            call.c, call.mix = address(inputs["c"]), address(inputs["mix"])
        call.images, call.logits = B, address(logits)
        call.guidance, call.control_guidance = address(guidance), address(by_control)
        call.twin, call.plain = address(twin), address(plain)
        self._start(call, workspace)

    def run_branch(self, inputs: Arrays, outputs: Arrays, workspace: Workspace) -> None:
        """One scale of a branch: `inputs` and `outputs` as a plan's branch has them, K and V in `cache_dtype`.

        outputs: `c` f32 [h, S, S, R, C], and `new_k_i`, `new_v_i`. ValueError as `run_step`.
        """
        R, S, *_ = inputs["x"].shape
        call, _kept = self._call(inputs, outputs)
        call.images, C = len(inputs["control"]), self._model.width
        _check(inputs["control"], (call.images, S, S, C))
        _check(inputs["rows"], (R,), np.int64)
        _check(outputs["c"], (self._model.depth, S, S, R, C))
        call.control, call.image, call.fused_c = map(address, (inputs["control"], inputs["rows"], outputs["c"]))
        self._start(call, workspace)

    def _call(self, inputs: Arrays, outputs: Arrays) -> tuple[_Call, list[Any]]:
        """What base and branches take alike, and what has to live as long as the call."""
        x, layers = inputs["x"], range(self._model.layers)
        R, S, *_ = x.shape
        C, H = self._model.width, self._model.heads
        keys, values = ([inputs[f"past_{kind}_{i}"] for i in layers] for kind in "kv")
        new_keys, new_values = ([outputs[f"new_{kind}_{i}"] for i in layers] for kind in "kv")
        past = len(keys[0])
        _check(x, (R, S, S, C))
        _check(inputs["modulation"], (R, self._model.modulation_rows, C))
        _check(inputs["pos"], (S, S, C))
        for array in (*keys, *values):
            _check(array, (past, R, H, C // H), self.cache_dtype)
        for array in (*new_keys, *new_values):
            _check(array, (S * S, R, H, C // H), self.cache_dtype)
        pointers = [_addresses(arrays) for arrays in (keys, values, new_keys, new_values)]
        past_k, past_v, new_k, new_v = (ctypes.cast(some, c_void_p) for some in pointers)
        call = _Call(
            rows=R,
            side=S,
            past=past,
            x=address(x),
            modulation=address(inputs["modulation"]),
            position=address(inputs["pos"]),
            past_k=past_k,
            past_v=past_v,
            new_k=new_k,
            new_v=new_v,
        )
        return call, [pointers]

    def _start(self, call: _Call, workspace: Workspace) -> None:
        size = self._library.car_workspace(byref(self._model), byref(call))
        if size < 0:
            raise ValueError(
                f"{call.rows} rows of {call.side} × {call.side} tokens after {call.past}: "
                "the kernels don't have such a size"
            )
        call.workspace = workspace.reserve(size)
        self._library.car_scale(byref(self._model), byref(call))

    def _block(self, block: Block) -> _Block:
        products = {name: self._packed.pack(getattr(block, name)) for name in ("qkv", "proj", "fc1", "fc2")}
        temperature = self._packed.kept(block.temperature)
        return _Block(**products, temperature=temperature, modulation=block.modulation, layer=block.layer)


def _declare(library: Any) -> None:
    declare(library)
    library.car_workspace.argtypes, library.car_workspace.restype = [POINTER(_Model), POINTER(_Call)], c_int64
    library.car_scale.argtypes, library.car_scale.restype = [POINTER(_Model), POINTER(_Call)], None


def _addresses(arrays: Sequence[NDArray[Any]]) -> Any:
    return (c_void_p * len(arrays))(*map(address, arrays))


def _check(array: NDArray[Any], shape: tuple[int, ...], dtype: Any = np.float32) -> None:
    if array.shape != shape or array.dtype != dtype or not array.flags.c_contiguous:
        raise ValueError(f"an array {array.dtype} {array.shape} where {np.dtype(dtype)} {shape} is wanted")
