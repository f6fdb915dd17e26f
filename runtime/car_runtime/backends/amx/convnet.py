"""Networks of convolutions in machine code for this CPU (`convnet.c`): weights packed once, then map after map.

Shapes: C channels, padded to a multiple of 32, of a map of H × W positions: f32 [C/32, H, W, 32].
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, Structure, byref, c_double, c_int64, c_void_p, pointer
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from car_runtime.backends.amx.description import (
    Attend,
    Convolution,
    Convolve,
    Floats,
    Network,
    Norm,
    UnsupportedGraphError,
)
from car_runtime.backends.amx.memory import Memory, PackedMatrix, Workspace, address, bf16_terms_of, declare

Sizes = tuple[tuple[int, int], ...]
"""Height and width of each map that goes through at once."""
_BLOCK, _TILE, _DEPTH = 32, 16, 32
"""Tiles of a block, positions of a tile, channels that lie together."""
_ATTENDED = 4096
"""Positions of a map with attention: scores of 32 of them to all others lie in a thread's scratch."""
_BLOCK_BYTES = 24
"""Of `struct block`."""
_BEYOND = 16384
"""Bytes behind what is multiplied: a tile reads 16 positions, however many a row has left."""


class _Norm(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("weight", "bias")),
        *((name, c_int64) for name in ("groups", "channels")),
        ("eps", c_double),
    ]


class _Moments(Structure):
    _fields_ = [(name, c_void_p) for name in ("map", "count", "values")]


class _Convolution(Structure):
    _fields_ = [
        ("matrix", PackedMatrix),
        *((name, c_int64) for name in ("channels", "down", "across", "blocks_per_chunk")),
        *((name, c_int64) for name in ("top", "left", "stride", "out_stride", "row", "column")),
    ]


class _Pass(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("maps", "threads")),
        *((name, c_void_p) for name in ("heights", "widths", "x", "pixels")),
        ("norm", POINTER(_Norm)),
        ("silu", c_int64),
        ("before", _Moments),
        ("blocks_before", c_int64),
        ("left", c_void_p),
        ("convolution", POINTER(_Convolution)),
        *((name, c_void_p) for name in ("residual", "out", "image", "next_left")),
        ("silu_after", c_int64),
        ("after", _Moments),
        *((name, c_int64) for name in ("first_block", "blocks_after")),
        ("scratch", c_void_p),
        ("scratch_bytes", c_int64),
    ]


class _Attention(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("maps", "threads")),
        *((name, c_void_p) for name in ("heights", "widths")),
        ("channels", c_int64),
        ("scale", c_double),
        *((name, c_void_p) for name in ("qkv", "out", "right", "scratch")),
        ("scratch_bytes", c_int64),
    ]


@dataclass(frozen=True)
class _Step:
    """A step of the network with its weights packed, and not in `what` any more."""

    what: Convolve | Attend
    norm: _Norm
    convolutions: tuple[_Convolution, ...]


class Convnet:
    """A network, ready to run. Threads may run it at once, each with a `ConvnetBuffers` of its own."""

    def __init__(self, library: Any, network: Network, threads: int) -> None:
        """Pack the weights on `threads` threads. Raises UnsupportedGraphError. `library`: `build.load`."""
        declare(library)
        library.car_convolve.argtypes, library.car_convolve.restype = [POINTER(_Pass)], c_int64
        library.car_attend.argtypes, library.car_attend.restype = [POINTER(_Attention)], c_int64
        self.library, self.network, self.threads = library, network, threads
        self.bf16_terms = bf16_terms_of(library)
        self._keep: list[NDArray[Any]] = []
        self.sections = _sections(network)
        self.channels = [s * _padded(c // s) for c, s in zip(network.channels, self.sections, strict=True)]
        """Padded, of each map."""
        self.kept_packed = {m for m in range(1, len(network.channels)) if self._is_kept_packed(m)}
        """Convnet that are kept as the convolution multiplies them that alone reads them."""
        kernels = [one for step in network.steps if isinstance(step, Convolve) for one in step.convolutions]
        sizes = [_padded(k.kernel.shape[1]) * k.kernel[0, 0].size for k in kernels]  # or less, of pixels
        outputs = [
            self.channels[step.target]
            for step in network.steps
            if isinstance(step, Convolve)
            for _ in step.convolutions
        ]
        products = sum(size * rows for size, rows in zip(sizes, outputs, strict=True))
        self._weights = Memory(library, 2 * self.bf16_terms * products)
        self._filled = 0
        self.steps = [self._step(step) for step in network.steps]
        self.network = replace(network, steps=tuple(step.what for step in self.steps))

    def _step(self, step: Convolve | Attend) -> _Step:
        if isinstance(step, Attend):
            return _Step(step, _Norm(), ())
        given = step.convolutions
        if self.network.pixels and step.source == 0:
            kernel = given[0].kernel.transpose(0, 2, 3, 1).reshape(len(given[0].kernel), -1, 1, 1)
            given = (replace(given[0], kernel=kernel, top=1, left=1),)
        convolutions = tuple(self._convolution(one, self.sections[step.target]) for one in given)
        packed = tuple(replace(one, kernel=np.empty((0, 0, 0, 0), np.float32)) for one in step.convolutions)
        return _Step(replace(step, convolutions=packed), self._norm(step.norm), convolutions)

    def _is_kept_packed(self, m: int) -> bool:
        readers = [step for step in self.network.steps if m in step.reads]
        makers = [step for step in self.network.steps if step.target == m]
        if len(readers) != 1 or not all(isinstance(step, Convolve) for step in (*readers, *makers)):
            return False
        reader, maker = readers[0], makers[0]
        assert isinstance(reader, Convolve)
        assert isinstance(maker, Convolve)
        alone = reader.norm is None and m != reader.residual
        return alone and maker.residual is None and len(maker.convolutions) == 1

    def _norm(self, norm: Norm | None) -> _Norm:
        if norm is None:
            return _Norm()
        weight, bias = self._kept(norm.weight), self._kept(norm.bias)
        return _Norm(weight=weight, bias=bias, groups=norm.groups, channels=len(norm.weight), eps=norm.eps)

    def _convolution(self, given: Convolution, sections: int) -> _Convolution:
        _, inputs, down, across = given.kernel.shape
        chunk = max(1, 16 // across)  # blocks of 32 channels, whose weights fit into the first cache or nearly do
        matrix = packing_order(given.kernel, sections, chunk)
        bias = _sectioned(given.bias[:, None], sections)[:, 0]
        packed = self._weights.address + self._filled
        self._filled += 2 * self.bf16_terms * matrix.size
        assert self._filled <= self._weights.size, (self._filled, self._weights.size)
        self.library.car_pack(address(matrix), *matrix.shape, packed, self.threads)
        packed_matrix = PackedMatrix(w=packed, b=self._kept(bias), inputs=matrix.shape[1], outputs=len(matrix))
        places = {name: getattr(given, name) for name in ("top", "left", "stride", "out_stride", "row", "column")}
        return _Convolution(packed_matrix, _padded(inputs), down, across, chunk, **places)

    def _kept(self, values: Floats) -> int:
        array = np.array(values, np.float32)  # a copy: the file's pages are given back
        self._keep.append(array)
        return address(array)


def packing_order(kernel: Floats, sections: int, chunk: int) -> Floats:
    """Kernels [outputs, inputs, down, across] as the matrix that `convnet.c` multiplies with, channels padded.

    [outputs, inputs/32/chunk · down · chunk · across · 32]; the outputs of each section are padded by themselves.
    """
    outputs, inputs, down, across = kernel.shape
    kernel = _sectioned(kernel.reshape(outputs, -1), sections).reshape(-1, inputs, down, across)
    padded = np.zeros((len(kernel), _padded(inputs), down, across), np.float32)
    padded[:, :inputs] = kernel
    blocks = padded.reshape(len(kernel), -1, _DEPTH, down, across).transpose(0, 3, 1, 4, 2)
    chunks = [blocks[:, :, i : i + chunk].reshape(len(kernel), -1) for i in range(0, blocks.shape[2], chunk)]
    return np.ascontiguousarray(np.concatenate(chunks, axis=1))


class ConvnetBuffers:
    """Memory of one call after the other, laid out for feature maps of one set of sizes."""

    def __init__(self, convnet: Convnet, sizes: Sizes) -> None:
        self._convnet, self._library, self._steps = convnet, convnet.library, convnet.network.steps
        self._workspace = Workspace(convnet.library)
        if not sizes or min(map(min, sizes)) < 1:
            raise UnsupportedGraphError(f"maps of {sizes} positions")
        bytes_each = 3 if convnet.network.pixels else 4 * convnet.channels[0]
        self._input = Memory(convnet.library, bytes_each * _positions(sizes))
        self._sizes = self._all_sizes(sizes)
        self._areas = {at: np.array(at, np.int64).T.copy() for at in self._sizes}
        for step in self._steps:
            if isinstance(step, Attend) and max(h * w for h, w in self._sizes[step.source]) > _ATTENDED:
                raise UnsupportedGraphError(f"attention over more than {_ATTENDED} positions")
        self._lay_out()

    @property
    def sizes(self) -> Sizes:
        """Height and width of each feature map that comes out."""
        return self._sizes[self._steps[-1].target]

    def input(self, k: int) -> Floats:
        """Feature map `k` of those that go in, f32 [C/32, H, W, 32], to be filled; padding channels stay 0."""
        sizes, C = self._sizes[0], self._convnet.channels[0]
        (H, W), start = sizes[k], 4 * C * _positions(sizes[:k])
        return self._view(self._input.address + start, (C // _DEPTH, H, W, _DEPTH))

    def pixels(self, k: int) -> NDArray[np.uint8]:
        """Image `k` of those that go in, where pixels do, uint8 [H, W, 3], to be filled."""
        (H, W), start = self._sizes[0][k], 3 * _positions(self._sizes[0][:k])
        memory: Any = (ctypes.c_char * (3 * H * W)).from_address(self._input.address + start)
        values: NDArray[np.uint8] = np.ndarray((H, W, 3), np.uint8, memory)
        return values

    def output(self, k: int) -> Floats:
        """Feature map `k` of those that came out."""
        last = self._steps[-1].target
        sizes, C = self.sizes, self._convnet.channels[last]
        (H, W), start = sizes[k], 4 * C * _positions(sizes[:k])
        return self._view(self._base + self._at[last] + start, (C // _DEPTH, H, W, _DEPTH))

    def run(self, image: NDArray[np.uint8] | None = None) -> None:
        """Compute `output` from `input`, or fill `image`, uint8 [maps, H, W, 3] of equal maps. ValueError if not."""
        if image is not None:
            expected = [(*size, 3) for size in self.sizes]
            if image.dtype != np.uint8 or not image.flags.c_contiguous or [one.shape for one in image] != expected:
                raise ValueError(f"pixels {image.dtype} {image.shape} where {expected} come out")
        self._base = int(self._workspace.reserve(self._bytes))
        for i, step in enumerate(self._convnet.steps):
            if isinstance(step.what, Attend):
                self._attend(step.what)
            else:
                self._convolve(step.what, step, image if i + 1 == len(self._convnet.steps) else None)

    def _convolve(self, what: Convolve, step: _Step, image: NDArray[np.uint8] | None) -> None:
        call = self._pass(self._sizes[what.source])
        call.left = self._base + self._left
        if what.source == 0 and self._convnet.network.pixels:
            call.pixels = self._place(0)
        elif what.source in self._convnet.kept_packed:
            call.left = self._place(what.source)
        else:
            call.x = self._place(what.source)
        call.norm, call.silu = pointer(step.norm), what.silu
        call.before, call.blocks_before = self._moments(what.source), self._blocks[what.source]
        call.residual = None if what.residual is None else self._place(what.residual)
        call.after = self._moments(what.target)
        if image is not None:
            call.image = address(image)
        elif what.target in self._convnet.kept_packed:
            call.next_left = self._place(what.target)
            call.silu_after = any(isinstance(s, Convolve) and s.source == what.target and s.silu for s in self._steps)
        else:
            call.out = self._place(what.target)
        call.blocks_after = self._blocks[what.target]
        call.scratch, call.scratch_bytes = self._base + self._scratch, self._scratch_bytes
        for convolution in step.convolutions:
            call.convolution = pointer(convolution)
            blocks = self._library.car_convolve(byref(call))
            if blocks < 0:
                raise ValueError(f"a convolution of map {what.source} has sizes that don't fit its memory")
            call.first_block += blocks
            call.x = call.pixels = None  # `left` is the same for the next

    def _attend(self, what: Attend) -> None:
        heights, widths = self._areas[self._sizes[what.source]]
        call = _Attention(
            maps=len(heights),
            threads=self._convnet.threads,
            heights=address(heights),
            widths=address(widths),
            channels=self._convnet.channels[what.target],
            scale=what.scale,
            qkv=self._place(what.source),
            out=self._place(what.target),
            right=self._base + self._left,
            scratch=self._base + self._scratch,
            scratch_bytes=self._scratch_bytes,
        )
        if self._library.car_attend(byref(call)):
            raise ValueError(f"attention over map {what.source} has sizes that don't fit its memory")

    def _pass(self, sizes: Sizes) -> _Pass:
        heights, widths = self._areas[sizes]
        return _Pass(
            maps=len(heights), threads=self._convnet.threads, heights=address(heights), widths=address(widths)
        )

    def _all_sizes(self, sizes: Sizes) -> list[Sizes]:
        """Height and width of the feature maps at every place of the network."""
        found = {0: sizes}
        for step in self._steps:
            H_W = found[step.source]
            if isinstance(step, Convolve):
                one = step.convolutions[0]
                H_W = tuple(
                    (((h - 1) // one.stride + 1) * one.out_stride, ((w - 1) // one.stride + 1) * one.out_stride)
                    for h, w in H_W
                )
            found[step.target] = H_W
        return [found[i] for i in range(len(found))]

    def _lay_out(self) -> None:
        """Where each map lies: memory is used again when a map has been read for the last time."""
        steps, channels = self._steps, self._convnet.channels
        last_read = {m: i for i, step in enumerate(steps) for m in step.reads}
        last_read[steps[-1].target] = len(steps)
        free: list[tuple[int, int]] = []
        self._at: dict[int, int] = {}
        end = left = 0
        held: dict[int, tuple[int, int]] = {}
        for i, step in enumerate(steps):
            size = self._bytes_of(step.target)
            fitting = sorted((space, at) for space, at in free if space >= size)
            if fitting:
                free.remove(fitting[0])
                held[step.target] = fitting[0]
            else:
                held[step.target], end = (size, end), end + size
            self._at[step.target] = held[step.target][1]
            free += [held.pop(m) for m in step.reads if last_read[m] == i and m in held]
            left = max(left, self._left_bytes(step))
        self._blocks = self._count_blocks()
        self._moments_at: dict[int, tuple[int, int, int]] = {}
        for m, blocks in self._blocks.items():
            self._moments_at[m] = (end, end + _aligned(8 * blocks), end + 2 * _aligned(8 * blocks))
            end += 2 * _aligned(8 * blocks) + _aligned(8 * blocks * channels[m])
        self._left, self._scratch = end, end + _aligned(left + _BEYOND)
        self._scratch_bytes = max(map(self._scratch_of, steps))
        self._bytes = self._scratch + self._convnet.threads * self._scratch_bytes
        self._base = 0

    def _bytes_of(self, m: int) -> int:
        sizes, C = self._sizes[m], self._convnet.channels[m]
        if m in self._convnet.kept_packed:
            return _aligned(2 * self._convnet.bf16_terms * _positions(sizes, 2) * C + _BEYOND)
        return _aligned(4 * _positions(sizes) * C)

    def _left_bytes(self, step: Convolve | Attend) -> int:
        terms, sizes = self._convnet.bf16_terms, self._sizes[step.source]
        if isinstance(step, Attend):
            groups = sum((h * w + 31) // 32 for h, w in sizes)
            return 2 * 2 * terms * groups * 32 * self._convnet.channels[step.target]
        if step.source in self._convnet.kept_packed:
            return 0
        return 2 * terms * _positions(sizes, 2) * self._convnet.channels[step.source]

    def _scratch_of(self, step: Convolve | Attend) -> int:
        """Bytes of a thread, as `convnet.c` counts them."""
        sizes, channels = self._sizes[step.source], self._convnet.channels
        if isinstance(step, Attend):
            groups = max(-(-h * w // 32) for h, w in sizes)
            operands = 4 * _DEPTH * _TILE * self._convnet.bf16_terms * (channels[step.target] // _DEPTH + groups)
            return operands + 4 * 32 * (32 * groups + 16)
        values = 2 * channels[step.source]
        if step.source == 0 and self._convnet.network.pixels:
            values = max(values, *(3 * (3 * (w + 2) + _TILE) for _, w in sizes))
        blocks = sum(-(-_tiles(size, step.convolutions[0].stride) // _BLOCK) for size in sizes)
        return _aligned(_BLOCK_BYTES * blocks) + _aligned(4 * values)

    def _count_blocks(self) -> dict[int, int]:
        """Number of blocks that each normalised feature map has moments of; 0 for the others."""
        steps = self._steps
        normalised = {s.source for s in steps if isinstance(s, Convolve) and s.norm is not None}
        if 0 in normalised or any(isinstance(s, Attend) and s.target in normalised for s in steps):
            raise UnsupportedGraphError("a norm of the input, or of what comes out of attention")
        found = dict.fromkeys(range(len(self._sizes)), 0)
        for step in steps:
            if isinstance(step, Convolve) and step.target in normalised:
                one = step.convolutions[0]
                for size in self._sizes[step.source]:
                    found[step.target] += len(step.convolutions) * -(-_tiles(size, one.stride) // _BLOCK)
        return found

    def _moments(self, m: int) -> _Moments:
        if not self._blocks[m]:
            return _Moments()
        return _Moments(*(self._base + at for at in self._moments_at[m]))

    def _place(self, m: int) -> int:
        return int(self._input.address) if m == 0 else self._base + self._at[m]

    def _view(self, start: int, shape: tuple[int, ...]) -> Floats:
        memory: Any = (ctypes.c_char * (4 * int(np.prod(shape)))).from_address(start)
        values: Floats = np.ndarray(shape, np.float32, memory)
        return values


def _sections(network: Network) -> list[int]:
    """Of each map: 3 if queries, keys and values are padded each by themselves, otherwise 1.

    UnsupportedGraphError if a step reads or makes such a map in another way than a convolution's for attention.
    """
    thirds = {step.source for step in network.steps if isinstance(step, Attend)}
    others = {m for step in network.steps if isinstance(step, Convolve) for m in (step.source, step.residual)}
    if thirds & others:
        raise UnsupportedGraphError("queries, keys and values that are read as a map too")
    apart = {m for m in thirds if network.channels[m] // 3 % _DEPTH}
    for step in network.steps:
        if step.target in apart and (isinstance(step, Attend) or step.residual is not None):
            raise UnsupportedGraphError("queries, keys and values that are no convolution's alone")
    if 0 in apart or not network.steps or min(network.channels) < 1:
        raise UnsupportedGraphError("a network of no steps or channels, or with attention to its input")
    return [3 if m in apart else 1 for m in range(len(network.channels))]


def _tiles(size: tuple[int, int], stride: int) -> int:
    """Of the positions that a convolution gives."""
    h, w = ((n - 1) // stride + 1 for n in size)
    return h * -(-w // _TILE)


def _positions(sizes: Sequence[tuple[int, int]], border: int = 0) -> int:
    return sum((h + border) * (w + border) for h, w in sizes)


def _padded(channels: int) -> int:
    return -(-channels // _DEPTH) * _DEPTH


def _aligned(size: int) -> int:
    return -(-size // 64) * 64


def _sectioned(rows: Floats, sections: int) -> Floats:
    """Rows of each section, padded with zeros."""
    each = len(rows) // sections
    padded = np.zeros((sections, _padded(each), rows.shape[1]), np.float32)
    padded[:, :each] = rows.reshape(sections, each, -1)
    return padded.reshape(sections * _padded(each), -1)
