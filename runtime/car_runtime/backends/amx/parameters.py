"""What the kernels run, made from a plan's weights by the model's own names. Nothing of a graph is read.

Shapes: C width, H heads, V codes, D blocks of the base, h = D/2 blocks of a branch.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

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
from car_runtime.format.parameters import Parameters

EPS = 1e-6
"""Of every norm of the model."""
GROUPS = 32
"""Of the tokenizer's norms; fewer where the channels don't divide."""
LARGEST_SCALE = math.log(100)
"""Of a head's temperature, as its logarithm."""


def named_base(base: Parameters, *, depth: int, width: int, heads: int, fused: int = 0) -> Transformer:
    """The base's transformer. `depth`, `width`, `heads`: D, C and H. `fused`: h, 0 without branches.

    UnsupportedGraphError for parameters that are missing or of another shape.
    """
    if not 0 <= fused <= depth:
        raise UnsupportedGraphError(f"branches are mixed in before {fused} of {depth} blocks")
    made = _transformer(base, depth, width, heads)
    return replace(made, modulation_rows=6 * depth + 2, head=named_linear(base, "head", None, width), fused=fused)


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


def named_linear(parameters: Parameters, name: str, outputs: int | None, inputs: int) -> Linear:
    """`name`.weight and `name`.bias."""
    matrix = parameters.view(f"{name}.weight", outputs, inputs)
    return Linear(matrix=matrix, bias=floats(parameters.view(f"{name}.bias", len(matrix))))


def named_block(block: Parameters, width: int, heads: int, layer: int) -> Block:
    """A block from its own parameters; `layer`: the number of its keys and values, and of its six modulations."""
    C = width
    bias = np.concatenate([floats(block.view(f"attn.{one}_bias", C)) for one in "qv"])
    logarithm = floats(block.view("attn.log_scale_H", heads))
    fc1 = named_linear(block, "mlp.fc1", None, C)
    return Block(
        qkv=Linear(matrix=block.view("attn.qkv_weight", 3 * C, C), bias=bias),
        proj=named_linear(block, "attn.proj", C, C),
        fc1=fc1,
        fc2=named_linear(block, "mlp.fc2", C, len(fc1.matrix)),
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
