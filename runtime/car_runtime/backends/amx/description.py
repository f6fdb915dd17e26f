"""What the kernels run, as data: a transformer, and networks of convolutions as a list of what to do one by one.

Whatever finds a plan's weights makes these. What the kernels can't run is an `UnsupportedGraphError`, and stays with
another engine.

Shapes: H heads, C width or channels of a map [C, H, W].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from car_runtime.format.parameters import UnsupportedGraphError as UnsupportedGraphError

Floats = NDArray[np.float32]


def floats(values: NDArray[Any]) -> Floats:
    return np.ascontiguousarray(values, np.float32)


@dataclass(frozen=True, kw_only=True)
class Linear:
    """y = x·Wᵀ + b."""

    matrix: Floats
    """[outputs, inputs]."""
    bias: Floats
    """[outputs]; of queries, keys and values [2C]: keys have none."""


@dataclass(frozen=True, kw_only=True)
class Block:
    qkv: Linear
    proj: Linear
    fc1: Linear
    fc2: Linear
    temperature: Floats
    """[H], what unit-length queries are multiplied with."""
    modulation: int
    """The first of its six rows."""
    layer: int
    """The number of its keys and values."""


@dataclass(frozen=True, kw_only=True)
class Fusion:
    """𝓖: x ← Linear(LayerNorm([x, c])), x + Linear(c), or x + weight·(c with the mean and variance of x)."""

    kind: str
    """"concat", "zero" or "cross_norm"."""
    linear: Linear | None
    weight: Floats | None
    """[2C], of the norm; [C] of "cross_norm"."""
    bias: Floats | None
    """[2C], of the norm."""


@dataclass(frozen=True, kw_only=True)
class Transformer:
    """A base, which has a head, or a control branch, which begins with a convolution."""

    width: int
    heads: int
    eps: float
    blocks: list[Block]
    modulation_rows: int
    layers: int
    """Keys and values that a call brings."""
    head: Linear | None = None
    inject: Linear | None = None
    """A branch's 3×3 convolution as a product of nine neighbours, row after row: [C, 9C]."""
    fused: int = 0
    """Of a base's last blocks, those before which branches are mixed in."""


@dataclass(frozen=True, kw_only=True)
class Norm:
    """The norm of groups of channels that precedes a convolution."""

    weight: Floats
    bias: Floats
    """[C]."""
    groups: int
    eps: float


@dataclass(frozen=True, kw_only=True)
class Convolution:
    """Zeros around the map; output (y, x) goes to (spread·y + row, spread·x + column)."""

    kernel: Floats
    """[outputs, inputs, down, across]."""
    bias: Floats
    top: int
    left: int
    """Where the first tap is: 0 at the neighbour above or to the left, 1 at the position itself."""
    stride: int = 1
    out_stride: int = 1
    row: int = 0
    column: int = 0


@dataclass(frozen=True, kw_only=True)
class Convolve:
    """target = residual + convolutions of silu(norm(source)), one convolution, or four that double the map."""

    source: int
    target: int
    convolutions: tuple[Convolution, ...]
    norm: Norm | None
    silu: bool
    residual: int | None

    @property
    def reads(self) -> tuple[int, ...]:
        """The maps that it wants, each once."""
        return tuple(dict.fromkeys([self.source] if self.residual is None else [self.source, self.residual]))

    @property
    def takes_pixels(self) -> bool:
        """Whether it is a plain convolution of 3 × 3 taps."""
        one = self.convolutions[0]
        plain = self.norm is None and not self.silu and self.residual != self.source
        return plain and len(self.convolutions) == one.stride == 1 and one.kernel.shape[2:] == (3, 3)


@dataclass(frozen=True, kw_only=True)
class Attend:
    """target = softmax(scale·qᵀk)·v over all positions; q, k and v are the source's channels in three parts."""

    source: int
    target: int
    scale: float

    @property
    def reads(self) -> tuple[int, ...]:
        """The map that it wants."""
        return (self.source,)


@dataclass(frozen=True, kw_only=True)
class Network:
    """Steps, one after the other. Feature maps are numbered: 0 is the input, the last target the output."""

    steps: tuple[Convolve | Attend, ...]
    channels: tuple[int, ...]
    """Channels of each feature map."""
    pixels: bool = False
    """Map 0 is made of pixels, 0 … 255 spread from −1 to 1, and read by a convolution of 3 × 3 taps alone."""
