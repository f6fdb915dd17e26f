"""A plan's control encoder and decoder, understood: networks of convolutions, as a list of what to do one by one.

Graphs are followed from their outputs back to their inputs. What comes out is what the graph computes; a graph that
computes anything else is an `UnsupportedGraphError`, and stays with another engine.

Shapes: C channels of a map [C, H, W].
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from car_runtime.backends.amx.description import (
    Attend,
    Convolution,
    Convolve,
    Floats,
    Network,
    Norm,
    UnsupportedGraphError,
    floats,
)
from car_runtime.backends.amx.graph import Graph, read_graph
from car_runtime.backends.amx.onnx_file import Node


def read_decoder(file: Path, weights: Path, channels: int, side: int) -> Network:
    """The network of a plan's decoder.onnx: from `f_hat` [channels, side, side] to pixels, not yet rounded.

    UnsupportedGraphError if it is none, or rounds them in another way than (clip(y, −1, 1) + 1)·127.5.
    """
    return read_graph(file, weights, lambda graph: _decoder(graph, channels, side))


def read_encoder(file: Path, weights: Path, sides: tuple[int, ...]) -> Network:
    """The network of a plan's control.onnx, from `control_k` [sides[k], sides[k], 3] − 1 … 1 to a scale's features.

    UnsupportedGraphError if it is none, or not the same one for all scales.
    """
    return read_graph(file, weights, lambda graph: _encoder(graph, sides))


def _decoder(graph: Graph, channels: int, side: int) -> Network:
    cast = graph.producer(graph.producer("image", "Transpose").input[0], "Cast")
    scaled = graph.producer(graph.producer(cast.input[0], "Round").input[0], "Mul")
    shifted = graph.producer(scaled.input[0], "Add")
    least = graph.producer(shifted.input[0], "Min")
    most = graph.producer(least.input[0], "Max")
    numbers = [graph.number(node.input[1]) for node in (most, least, shifted, scaled)]
    turned = graph.producer("image", "Transpose").attributes.get("perm") == [0, 2, 3, 1]
    if numbers != [-1, 1, 1, 127.5] or cast.attributes.get("to") != 2 or not turned:
        raise UnsupportedGraphError(f"pixels are rounded otherwise, by {numbers}")
    reader = _Reader(graph, "f_hat", channels, (side, side))
    if reader.channels[reader.map(most.input[0])] != 3:
        raise UnsupportedGraphError("the image is not of three channels")
    network = reader.network()
    last = network.steps[-1] if network.steps else None
    if not isinstance(last, Convolve) or len(last.convolutions) != 1 or last.residual is not None:
        raise UnsupportedGraphError("the image is not what one convolution gives")
    return network


def _encoder(graph: Graph, sides: tuple[int, ...]) -> Network:
    joined = graph.producer("features", "Concat")
    if joined.attributes.get("axis") != 0 or len(joined.input) != len(sides):
        raise UnsupportedGraphError("features are not joined scale by scale")
    networks = [
        _encoder_of(graph, k, side, name) for k, (side, name) in enumerate(zip(sides, joined.input, strict=True))
    ]
    first, *others = networks
    if any(names != first[1] or network.channels != first[0].channels for network, names in others):
        raise UnsupportedGraphError("scales have encoders of their own")
    return first[0]


def _encoder_of(graph: Graph, k: int, side: int, features: str) -> tuple[Network, list[object]]:
    """The network of one scale, and all that distinguishes it from another one's."""
    centred = graph.follow("Unsqueeze", graph.follow("Transpose", f"control_{k}", perm=[2, 0, 1]), None)
    shares = graph.reader("Div", graph.follow("Cast", centred, to=1), None)
    doubled = graph.reader("Mul", shares.output[0], None)
    pixels = graph.reader("Sub", doubled.output[0], None)
    if [graph.number(node.input[1]) for node in (shares, doubled, pixels)] != [255, 2, 1]:
        raise UnsupportedGraphError(f"control_{k} is not spread from −1 to 1")
    reader = _Reader(graph, pixels.output[0], 3, (side, side))
    first = graph.producer(features, "Gather")
    turned = graph.producer(first.input[0], "Transpose")
    flat = graph.producer(turned.input[0], "Reshape")
    C, (H, W) = reader.channels[last := reader.map(flat.input[0])], reader.sizes[last]
    shape = graph.constant(flat.input[1]).tolist()
    axis, perm = first.attributes.get("axis"), turned.attributes.get("perm")
    if shape != [1, C, H * W] or (axis, perm) != (0, [0, 2, 1]) or graph.number(first.input[1]) != 0:
        raise UnsupportedGraphError(f"{features} are not the encoder's tokens")
    network = reader.network()
    firsts = [step for step in network.steps if 0 in step.reads]
    if len(firsts) != 1 or not isinstance(firsts[0], Convolve) or not firsts[0].takes_pixels:
        raise UnsupportedGraphError(f"pixels of control_{k} go elsewhere than into a convolution of 3 × 3 taps")
    return replace(network, pixels=True), reader.signature


@dataclass
class _Reader:
    graph: Graph
    source: str
    source_channels: int
    size: tuple[int, int]
    channels: list[int] = field(init=False)
    sizes: list[tuple[int, int]] = field(init=False)
    signature: list[object] = field(default_factory=list)
    """All steps with the names of their constants."""
    _steps: list[Convolve | Attend] = field(default_factory=list)
    _made: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if min(self.source_channels, *self.size) < 1:
            raise UnsupportedGraphError(f"a map of {self.source_channels} channels and {self.size} positions")
        self.channels, self.sizes = [self.source_channels], [self.size]
        self._made[self.source] = 0

    def network(self) -> Network:
        return Network(steps=tuple(self._steps), channels=tuple(self.channels))

    def map(self, name: str) -> int:
        """The number of the map that is called so; what makes it is put behind what there is."""
        if name not in self._made:
            kind = self.graph.given_by(name)
            makers = {
                "Conv": self._convolve,
                "Add": self._sum,
                "DepthToSpace": self._doubled,
                "Reshape": self._attended,
            }
            if kind not in makers:
                raise UnsupportedGraphError(f"{name} is given by {kind or 'nothing'}")
            self._made[name] = makers[kind](name)
        return self._made[name]

    def _convolve(self, name: str, residual: str | None = None) -> int:
        node = self.graph.producer(name, "Conv")
        source, norm, silu, signature = self._input(node.input[0])
        convolution = self._convolution(node)
        _, _, down, across = convolution.kernel.shape
        stride, (H, W) = convolution.stride, self.sizes[source]
        pads, strides = [down // 2, across // 2] * 2, node.attributes.get("strides")
        if (
            node.attributes.get("pads") != pads
            or strides != [stride] * 2
            or stride not in (1, 2)
            or {down, across} - {1, 3}
        ):
            raise UnsupportedGraphError(f"{name}: {down} × {across} taps, in steps of {stride}, or other pads")
        convolution = replace(convolution, top=1 - down // 2, left=1 - across // 2)
        size = ((H - 1) // stride + 1, (W - 1) // stride + 1)
        return self._step(source, (convolution,), norm, silu, residual, size, [signature, node.input[1:], stride])

    def _convolution(self, node: Node) -> Convolution:
        """A node's kernel, bias and stride. Raises UnsupportedGraphError for another kind of convolution."""
        plain = {"group": 1, "dilations": [1, 1], "auto_pad": b"NOTSET"}
        if len(node.input) != 3 or any(node.attributes.get(key) != value for key, value in plain.items()):
            raise UnsupportedGraphError(f"{node.output[0]}: a convolution of another kind")
        kernel, bias = (floats(self.graph.constant(name)) for name in node.input[1:])
        strides = node.attributes.get("strides")
        if (
            kernel.ndim != 4
            or 0 in kernel.shape
            or bias.shape != kernel.shape[:1]
            or not isinstance(strides, list)
            or not strides
        ):
            raise UnsupportedGraphError(f"{node.output[0]}: kernels {kernel.shape}, biases {bias.shape}")
        return Convolution(kernel=kernel, bias=bias, top=0, left=0, stride=strides[0])

    def _step(
        self,
        source: int,
        convolutions: tuple[Convolution, ...],
        norm: Norm | None,
        silu: bool,
        residual: str | None,
        size: tuple[int, int],
        signature: object,
    ) -> int:
        outputs, inputs = convolutions[0].kernel.shape[:2]
        if inputs != self.channels[source]:
            raise UnsupportedGraphError(f"kernels of {inputs} channels for a map of {self.channels[source]}")
        other = None if residual is None else self.map(residual)
        if other is not None and (self.channels[other], self.sizes[other]) != (outputs, size):
            raise UnsupportedGraphError("a sum of maps of different sizes")
        target = self._new(outputs, size)
        self._steps.append(
            Convolve(source=source, target=target, convolutions=convolutions, norm=norm, silu=silu, residual=other)
        )
        self.signature.append((source, target, other, silu, signature))
        return target

    def _new(self, channels: int, size: tuple[int, int]) -> int:
        self.channels.append(channels)
        self.sizes.append(size)
        return len(self.channels) - 1

    def _sum(self, name: str) -> int:
        """A map added to what a convolution gives nobody else."""
        first, second = self.graph.producer(name, "Add").input
        for convolved, other in ((second, first), (first, second)):
            if self.graph.given_by(convolved) == "Conv" and len(self.graph.readers(convolved)) == 1:
                self.map(other)
                return self._convolve(convolved, other)
        raise UnsupportedGraphError(f"{name} is not the sum of a map and a convolution's")

    def _input(self, name: str) -> tuple[int, Norm | None, bool, object]:
        """The map that a convolution reads, what is done with it before, and what distinguishes that from others."""
        graph, silu = self.graph, False
        if name not in self._made and graph.given_by(name) == "Mul":
            x, share = graph.producer(name, "Mul").input
            if graph.producer(share, "Sigmoid").input != (x,):
                raise UnsupportedGraphError(f"{name} is not x·sigmoid(x)")
            name, silu = x, True
        if graph.given_by(name) == "Add" and self._is_constant(graph.producer(name, "Add").input[1]):
            scaled, shift = graph.producer(name, "Add").input
            grouped, scale = graph.producer(scaled, "Mul").input
            x, groups, eps = self._grouped(grouped)
            source = self.map(x)
            weight, bias = (self._per_channel(constant, self.channels[source]) for constant in (scale, shift))
            if self.channels[source] % groups:
                raise UnsupportedGraphError(f"{groups} groups of {self.channels[source]} channels")
            return source, Norm(weight=weight, bias=bias, groups=groups, eps=eps), silu, (scale, shift, groups, eps)
        return self.map(name), None, silu, None

    def _grouped(self, name: str) -> tuple[str, int, float]:
        """Groups of channels with mean 0 and variance 1: of which map, how many, and ε."""
        graph = self.graph
        back = graph.producer(name, "Reshape")
        norm = graph.producer(back.input[0], "InstanceNormalization")
        groups = graph.producer(norm.input[0], "Reshape")
        x = groups.input[0]
        shape = graph.constant(groups.input[1]).tolist()
        one, zero = (graph.constant(constant) for constant in norm.input[1:])
        eps = norm.attributes.get("epsilon", 1e-5)
        if graph.producer(back.input[1], "Shape").input != (x,) or len(shape) != 3 or [shape[0], shape[2]] != [0, -1]:
            raise UnsupportedGraphError(f"{name} is not normalised in groups of channels")
        count = int(shape[1])
        if count < 1 or one.shape != (count,) or (one != 1).any() or zero.any() or not isinstance(eps, float):
            raise UnsupportedGraphError(f"{name} is normalised with weights of its groups")
        return x, count, eps

    def _per_channel(self, name: str, channels: int) -> Floats:
        graph = self.graph
        shape: tuple[int, ...] = (channels, 1, 1)
        if graph.given_by(name) == "Unsqueeze":
            name, axes = graph.producer(name, "Unsqueeze").input
            if graph.constant(axes).tolist() != [1, 2]:
                raise UnsupportedGraphError(f"{name} is not spread over a map")
            shape = (channels,)
        values = floats(graph.constant(name))
        if values.shape != shape:
            raise UnsupportedGraphError(f"{name} is no number per channel")
        return values.reshape(channels)

    def _is_constant(self, name: str) -> bool:
        return self.graph.given_by(name) in ("", "Unsqueeze") and name not in self._made

    def _doubled(self, name: str) -> int:
        """Four convolutions of 2 × 2 taps, each of which makes a quarter of a map of twice the size."""
        graph = self.graph
        node = graph.producer(name, "DepthToSpace")
        joined = graph.producer(node.input[0], "Concat")
        if (node.attributes.get("blocksize"), node.attributes.get("mode", b"DCR")) != (2, b"DCR"):
            raise UnsupportedGraphError(f"{name} is spread otherwise")
        if joined.attributes.get("axis") != 1 or len(joined.input) != 4:
            raise UnsupportedGraphError(f"{name} is not of four parts")
        convolutions, sources, signature = list[Convolution](), set[str](), list[object]()
        for i, part in enumerate(joined.input):
            conv = graph.producer(part, "Conv")
            padded = graph.producer(conv.input[0], "Pad")
            row, column = divmod(i, 2)
            pads = graph.constant(padded.input[1]).tolist()
            known = conv.attributes.get("pads") == [0] * 4 and conv.attributes.get("strides") == [1, 1]
            zeros = padded.attributes.get("mode", b"constant") == b"constant" and len(padded.input) == 2
            if pads != [0, 0, 1 - row, 1 - column, 0, 0, row, column] or not known or not zeros:
                raise UnsupportedGraphError(f"{part} is no quarter of a doubled map")
            one = self._convolution(conv)
            if one.kernel.shape[2:] != (2, 2):
                raise UnsupportedGraphError(f"{part} has kernels {one.kernel.shape}")
            convolutions.append(replace(one, top=row, left=column, out_stride=2, row=row, column=column))
            sources.add(padded.input[0])
            signature.append(conv.input[1:])
        if len(sources) != 1 or len({one.kernel.shape for one in convolutions}) != 1:
            raise UnsupportedGraphError(f"{name} is not of four parts of one map")
        source = self.map(sources.pop())
        H, W = self.sizes[source]
        return self._step(source, tuple(convolutions), None, False, None, (2 * H, 2 * W), signature)

    def _attended(self, name: str) -> int:
        """Attention of one head over all positions."""
        graph = self.graph
        shaped = graph.producer(name, "Reshape")
        out = graph.producer(shaped.input[0], "MatMul")
        weights = graph.producer(graph.producer(out.input[1], "Transpose").input[0], "Softmax")
        scores = graph.producer(weights.input[0], "MatMul")
        scaled = graph.producer(scores.input[0], "Mul")
        turned = graph.producer(scaled.input[0], "Transpose")
        split = graph.producer(turned.input[0], "Split")
        flat = graph.producer(split.input[0], "Reshape")
        source = self.map(flat.input[0])
        (H, W), C = self.sizes[source], self.channels[source] // 3
        perms = [node.attributes.get("perm") for node in (turned, graph.producer(out.input[1], "Transpose"))]
        parts = [turned.input[0], scores.input[1], out.input[0]]
        known = perms == [[0, 2, 1]] * 2 and parts == list(split.output) and weights.attributes.get("axis") == -1
        equal = split.attributes.get("axis") == 1 and (len(split.input) == 1 or self._thirds(split.input[1], C))
        shapes = [graph.constant(node.input[1]).tolist() for node in (flat, shaped)]
        if not known or not equal or self.channels[source] != 3 * C:
            raise UnsupportedGraphError(f"{name} is no attention of one head")
        if shapes != [[0, 3 * C, H * W], [0, C, H, W]]:
            raise UnsupportedGraphError(f"{name}: a map of {H} × {W} in another shape")
        target = self._new(C, (H, W))
        scale = graph.number(scaled.input[1])
        self._steps.append(Attend(source=source, target=target, scale=scale))
        self.signature.append((source, target, scale))
        return target

    def _thirds(self, name: str, size: int) -> bool:
        return bool(np.array_equal(self.graph.constant(name), [size] * 3))
