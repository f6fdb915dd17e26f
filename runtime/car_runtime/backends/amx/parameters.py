"""A plan's weights by the model's own names, and what the kernels run, made from them.

A table says where in `weights.bin` each parameter lies. It may be a stranger's: every entry is checked before a view
is made, and every view has the shape that its user asks for. Nothing of a graph is read.

Shapes: C width, H heads, V codes, D blocks of the base, h = D/2 blocks of a branch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from car_runtime.backends.amx.description import (
    Attend,
    Block,
    Convolution,
    Convolve,
    Floats,
    Linear,
    Network,
    Norm,
    Transformer,
    UnsupportedGraphError,
    floats,
)
from car_runtime.format.manifest import WEIGHTS, Manifest

EPS = 1e-6
"""Of every norm of the model."""
GROUPS = 32
"""Of the tokenizer's norms; fewer where the channels don't divide."""
LARGEST_SCALE = math.log(100)
"""Of a head's temperature, as its logarithm."""
DTYPES: dict[str, np.dtype[Any]] = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2")}
"""What a parameter can be stored in, if the kernels are to read it."""
LAYOUTS = ("plain", "transposed")
DIMENSIONS = 4
"""No parameter has more."""


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
        name = self._prefix + name
        entry = self._table.get(name)
        if entry is None:
            raise UnsupportedGraphError(f"the plan's table has no parameter {name}")
        stored = self._mapped(name, entry)
        values: NDArray[Any] = stored.T if entry.layout == "transposed" else stored
        fits = len(values.shape) == len(shape) and all(
            want in (None, got) for want, got in zip(shape, values.shape, strict=True)
        )
        if not fits:
            wanted = " × ".join("any" if size is None else str(size) for size in shape)
            raise UnsupportedGraphError(f"{name} is {list(values.shape)} where {wanted} is wanted")
        return values

    def _mapped(self, name: str, entry: Entry) -> NDArray[Any]:
        dtype = DTYPES.get(entry.dtype)
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

    def linear(self, name: str, outputs: int | None, inputs: int) -> Linear:
        """`name`.weight and `name`.bias."""
        matrix = self.view(f"{name}.weight", outputs, inputs)
        return Linear(matrix=matrix, bias=floats(self.view(f"{name}.bias", len(matrix))))


def plan_parameters(manifest: Manifest, root: Path) -> Parameters:
    """All parameters of a plan of format 2 in the folder `root`.

    UnsupportedGraphError with the remedy if it has no table, or one that was written with other graphs.
    """
    problem = manifest.table_problem
    if problem is not None:
        raise UnsupportedGraphError(problem)
    return Parameters(manifest.parameters, root / WEIGHTS)


def named_base(base: Parameters, *, depth: int, width: int, heads: int, fused: int = 0) -> Transformer:
    """The base's transformer. `depth`, `width`, `heads`: D, C and H. `fused`: h, 0 without branches.

    UnsupportedGraphError for parameters that are missing or of another shape.
    """
    if not 0 <= fused <= depth:
        raise UnsupportedGraphError(f"branches are mixed in before {fused} of {depth} blocks")
    made = _transformer(base, depth, width, heads)
    return replace(made, modulation_rows=6 * depth + 2, head=base.linear("head", None, width), fused=fused)


def named_branch(branch: Parameters, *, blocks: int, width: int, heads: int) -> Transformer:
    """A branch's transformer of so many blocks, h. UnsupportedGraphError also where its blocks are convolutions."""
    if branch.has("blocks.0.conv1.weight"):
        raise UnsupportedGraphError("the branch's blocks are convolutions")
    return replace(_transformer(branch, blocks, width, heads), inject=named_inject(branch, width))


def _transformer(module: Parameters, depth: int, width: int, heads: int) -> Transformer:
    if heads < 1 or width % heads or width // heads not in (32, 64):
        raise UnsupportedGraphError(f"{heads} heads of {width} channels; a head has to have 32 or 64")
    if depth < 1:
        raise UnsupportedGraphError(f"{depth} blocks")
    blocks = [named_block(module.under(f"blocks.{i}."), width, heads, i) for i in range(depth)]
    if len({len(block.fc1.matrix) for block in blocks}) != 1:
        raise UnsupportedGraphError("MLPs of different widths")
    return Transformer(width=width, heads=heads, eps=EPS, blocks=blocks, modulation_rows=6 * depth, layers=depth)


def named_block(block: Parameters, width: int, heads: int, layer: int) -> Block:
    """A block from its own parameters; `layer`: the number of its keys and values, and of its six modulations."""
    C = width
    bias = np.concatenate([floats(block.view(f"attn.{one}_bias", C)) for one in "qv"])
    logarithm = floats(block.view("attn.log_scale_H", heads))
    fc1 = block.linear("mlp.fc1", None, C)
    return Block(
        qkv=Linear(matrix=block.view("attn.qkv_weight", 3 * C, C), bias=bias),
        proj=block.linear("attn.proj", C, C),
        fc1=fc1,
        fc2=block.linear("mlp.fc2", C, len(fc1.matrix)),
        temperature=np.exp(np.minimum(logarithm, np.float32(LARGEST_SCALE))),
        modulation=6 * layer,
        layer=layer,
    )


def named_inject(branch: Parameters, width: int) -> Linear:
    """A branch's 3×3 convolution as a product of nine neighbours."""
    kernel = branch.view("input_conv.weight", width, width, 3, 3)
    matrix = np.ascontiguousarray(kernel.transpose(0, 2, 3, 1), np.float32).reshape(width, -1)
    return Linear(matrix=matrix, bias=floats(branch.view("input_conv.bias", width)))


def named_decoder(vqvae: Parameters, channels: int) -> Network:
    """The tokenizer's decoder, from f̂ of so many channels to pixels from −1 to 1, neither clamped nor rounded."""
    made = _Network(vqvae, channels)
    made.convolve("post_quant_conv", channels, 3)
    decoder = made.inside("decoder.")
    decoder.convolve("conv_in", None, 3)
    decoder.residual_block("mid.block_1.")
    decoder.attention("mid.attn_1.")
    decoder.residual_block("mid.block_2.")
    for i in reversed(range(decoder.parameters.numbers("levels.{}.block.0.conv1.weight"))):
        level = f"levels.{i}."
        for j in range(decoder.parameters.numbers(level + "block.{}.conv1.weight")):
            decoder.residual_block(f"{level}block.{j}.")
            if decoder.parameters.has(f"{level}attn.{j}.qkv.weight"):
                decoder.attention(f"{level}attn.{j}.")
        if i:
            decoder.double(f"{level}resample.conv")
    decoder.convolve("conv_out", 3, 3, norm="norm_out", silu=True)
    return made.network()


def named_encoder(branch: Parameters, width: int, patch: int) -> Network:
    """A branch's convolutional 𝓕, from pixels to features [C, S, S]. `patch`: pixels per token, along one side.

    UnsupportedGraphError for another kind of encoder, and where it isn't certain which of its steps have a stride.
    """
    if branch.has("encoder.quant_conv.weight"):
        raise UnsupportedGraphError("𝓕 is the tokenizer's encoder")
    made = _Network(branch, 3).inside("encoder.")
    made.convolve("conv_in", None, 3)
    count = made.parameters.numbers("steps.{}.weight")
    if count % 2 or patch not in (1, 2 ** (count // 2)):
        raise UnsupportedGraphError(f"{count} convolutions in 𝓕 shrink by {patch}")
    for i in range(count):
        made.convolve(f"steps.{i}", None, 3, silu=True, stride=2 if i % 2 and patch > 1 else 1)
    made.convolve("conv_out", width, 3, silu=True)
    return made.network(pixels=True)


class _Network:
    """A network that grows by one step after the other; each reads the newest map."""

    def __init__(self, parameters: Parameters, channels: int) -> None:
        self.parameters = parameters
        self._steps: list[Convolve | Attend] = []
        self._channels = [channels]

    def inside(self, prefix: str) -> _Network:
        """The same network, whose steps' names stand behind `prefix`."""
        other = _Network(self.parameters.under(prefix), 0)
        other._steps, other._channels = self._steps, self._channels
        return other

    def network(self, pixels: bool = False) -> Network:
        """What has been put together."""
        return Network(steps=tuple(self._steps), channels=tuple(self._channels), pixels=pixels)

    def convolve(
        self,
        name: str,
        outputs: int | None,
        taps: int,
        *,
        norm: str | None = None,
        silu: bool = False,
        stride: int = 1,
        source: int | None = None,
        residual: int | None = None,
    ) -> int:
        """residual + convolution of silu(norm(source)); returns the new map's number."""
        source = len(self._channels) - 1 if source is None else source
        kernel, bias = self._kernel(name, outputs, self._channels[source], taps)
        place = 1 - taps // 2
        one = Convolution(kernel=kernel, bias=bias, top=place, left=place, stride=stride)
        normed = None if norm is None else self._norm(norm, self._channels[source])
        return self._add(source, (one,), normed, silu, residual)

    def residual_block(self, name: str) -> None:
        """x + conv3(SiLU(norm(conv3(SiLU(norm(x)))))); where channels change, x by a convolution of one tap."""
        x = len(self._channels) - 1
        short = x
        if self.parameters.has(f"{name}nin_shortcut.weight"):
            short = self.convolve(f"{name}nin_shortcut", None, 1, source=x)
        self.convolve(f"{name}conv1", self._channels[short], 3, norm=f"{name}norm1", silu=True, source=x)
        self.convolve(f"{name}conv2", self._channels[short], 3, norm=f"{name}norm2", silu=True, residual=short)

    def attention(self, name: str) -> None:
        """x + attention of one head over all positions."""
        x = len(self._channels) - 1
        C = self._channels[x]
        qkv = self.convolve(f"{name}qkv", 3 * C, 1, norm=f"{name}norm")
        self._channels.append(C)
        self._steps.append(Attend(source=qkv, target=qkv + 1, scale=C**-0.5))
        self.convolve(f"{name}proj_out", C, 1, residual=x)

    def double(self, name: str) -> None:
        """Nearest-neighbour doubling and a convolution of 3 × 3 taps, as four of 2 × 2 on the small map.

        Neighbours that doubling makes equal meet several taps, which are added here.
        """
        source = len(self._channels) - 1
        kernel, bias = self._kernel(name, None, self._channels[source], 3)
        quarters = []
        for row in (0, 1):
            for column in (0, 1):
                small = _joined(_joined(kernel, 2, row), 3, column)
                places = {"top": row, "left": column, "out_stride": 2, "row": row, "column": column}
                quarters.append(Convolution(kernel=small, bias=bias, **places))
        self._add(source, tuple(quarters), None, False, None)

    def _kernel(self, name: str, outputs: int | None, inputs: int, taps: int) -> tuple[Floats, Floats]:
        kernel = floats(self.parameters.view(f"{name}.weight", outputs, inputs, taps, taps))
        return kernel, floats(self.parameters.view(f"{name}.bias", len(kernel)))

    def _norm(self, name: str, channels: int) -> Norm:
        weight, bias = (floats(self.parameters.view(f"{name}.{one}", channels)) for one in ("weight", "bias"))
        return Norm(weight=weight, bias=bias, groups=math.gcd(GROUPS, channels), eps=EPS)

    def _add(
        self,
        source: int,
        convolutions: tuple[Convolution, ...],
        norm: Norm | None,
        silu: bool,
        residual: int | None,
    ) -> int:
        target = len(self._channels)
        self._channels.append(len(convolutions[0].kernel))
        self._steps.append(
            Convolve(source=source, target=target, convolutions=convolutions, norm=norm, silu=silu, residual=residual)
        )
        return target


def _joined(kernel: Floats, axis: int, shift: int) -> Floats:
    """Three taps along an axis → the two that meet different pixels: of even rows (shift 0) or odd ones (shift 1)."""
    first, middle, last = np.moveaxis(kernel, axis, 0)
    return np.stack([first + middle, last] if shift else [first, middle + last], axis)
