"""A plan's step graph, understood: which of its constants is which weight of the transformer.

The graph is followed from its inputs to `logits`, node by node, as a VAR transformer with or without a control branch
would have it. So what comes out is what the graph computes, whatever its constants are called; a graph that computes
anything else is an `UnsupportedGraphError`.

Shapes: C width, H heads, V codes, D blocks of the base.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from car_runtime.backends.amx.description import (
    Block,
    CombinedStep,
    Floats,
    Fusion,
    Linear,
    Transformer,
    UnsupportedGraphError,
    floats,
)
from car_runtime.backends.amx.graph import Graph, read_graph
from car_runtime.backends.amx.onnx_file import Node


def read_step(file: Path, weights: Path) -> CombinedStep:
    """The transformer of a plan's `step.onnx`; its large constants are mapped from the file `weights`, not read.

    UnsupportedGraphError if it is none. Shapes are checked: all fit each other.
    """
    return read_graph(file, weights, lambda graph: _Reader(graph).step())


class _Reader:
    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        turned = graph.follow("Transpose", "modulation", perm=[1, 0, 2])
        self._rows = list(graph.reader("Split", turned, axis=0).output)
        self._position = graph.follow("Reshape", "pos", None)
        self._eps: set[float] = set()
        self._width = self._heads = 0

    def step(self) -> CombinedStep:
        graph = self._graph
        x = graph.follow("Reshape", "x", None)
        x = graph.follow("Transpose", self._sum(x, self._position), perm=[1, 0, 2])
        inject, branch, states = self._branch()
        base: list[Block] = []
        fusions: list[Fusion] = []
        depth = len(self._rows) // 6 - len(branch)
        for i in range(depth):
            if i >= depth - len(branch):
                fusion, x = self._fusion(x, states.pop())
                fusions.append(fusion)
            block, x = self._block(x, 6 * i)
            base.append(block)
        h = self._modulated(x, len(self._rows) - 2, len(self._rows) - 1)
        head, logits = self._linear(h, None, self._width)
        self._guided(graph.follow("Transpose", logits, perm=[1, 0, 2]))
        if len(self._eps) != 1:
            raise UnsupportedGraphError(f"norms with different eps, {self._eps}")
        if len({len(block.fc1.matrix) for block in [*base, *branch]}) != 1:
            raise UnsupportedGraphError("MLPs of different widths")
        if sorted(block.layer for block in [*base, *branch]) != list(range(len(base) + len(branch))):
            raise UnsupportedGraphError("keys and values of a layer twice")
        every = Transformer(
            width=self._width,
            heads=self._heads,
            eps=self._eps.pop(),
            blocks=base,
            modulation_rows=len(self._rows),
            layers=len(base) + len(branch),
            head=head,
            fused=len(fusions),
        )
        steering = replace(every, blocks=branch, head=None, inject=inject, fused=0) if branch else None
        return CombinedStep(base=every, branch=steering, fusions=fusions)

    def _branch(self) -> tuple[Linear | None, list[Block], list[str]]:
        """The control branch, and what each of its blocks gives."""
        graph = self._graph
        try:
            features = graph.follow("Reshape", "control", None)
        except UnsupportedGraphError:
            return None, [], []
        maps = graph.follow("Transpose", "x", perm=[0, 3, 1, 2])
        conv = graph.reader(
            "Conv", maps, pads=[1] * 4, strides=[1, 1], kernel_shape=[3, 3], group=1, dilations=[1, 1]
        )
        kernel, bias = (graph.constant(name) for name in conv.input[1:])
        C = self._width = len(kernel)
        if (kernel.shape, bias.shape) != ((C, C, 3, 3), (C,)):
            raise UnsupportedGraphError(f"the branch's convolution has kernels {kernel.shape}")
        tokens = graph.follow("Transpose", graph.follow("Reshape", conv.output[0], None), perm=[0, 2, 1])
        c = self._sum(self._sum(tokens, features), self._position)
        c = graph.follow("Transpose", c, perm=[1, 0, 2])
        matrix = np.ascontiguousarray(kernel.transpose(0, 2, 3, 1), np.float32).reshape(len(kernel), -1)
        blocks: list[Block] = []
        states: list[str] = []
        # Its blocks are half as many as the base's: a third of all.
        blocks_in_all = len(self._rows) // 6
        for j in range(blocks_in_all // 3):
            block, c = self._block(c, 6 * (blocks_in_all - blocks_in_all // 3 + j))
            blocks.append(block)
            states.append(c)
        return Linear(matrix=matrix, bias=floats(bias)), blocks, states

    def _block(self, x: str, row: int) -> tuple[Block, str]:
        gamma1, gamma2, scale1, scale2, shift1, shift2 = range(row, row + 6)
        qkv, temperature, layer, h = self._attention(self._modulated(x, scale1, shift1))
        proj, h = self._linear(h, self._width, self._width)
        x = self._sum(x, self._times(h, self._rows[gamma1]))
        fc1, h = self._linear(self._modulated(x, scale2, shift2), None, self._width)
        fc2, h = self._linear(self._graph.follow("Gelu", h, approximate=b"tanh"), self._width, len(fc1.matrix))
        x = self._sum(x, self._times(h, self._rows[gamma2]))
        return Block(qkv=qkv, proj=proj, fc1=fc1, fc2=fc2, temperature=temperature, modulation=row, layer=layer), x

    def _attention(self, h: str) -> tuple[Linear, Floats, int, str]:
        graph = self._graph
        product = graph.reader("MatMul", h, None)
        matrix = graph.constant(product.input[1]).T
        C = self._width = self._width or matrix.shape[-1]
        split = graph.reader("Split", product.output[0], axis=2)
        if matrix.shape != (3 * C, C) or len(split.output) != 3:
            raise UnsupportedGraphError(f"queries, keys and values by a matrix {matrix.shape}")
        q, k, v = split.output
        q, q_bias = self._plus_constant(q)
        scaled = graph.reader("Mul", self._unit(q), None)
        temperature = floats(graph.constant(scaled.input[1])).reshape(-1)
        self._heads = self._heads or len(temperature)
        if len(temperature) != self._heads or C / self._heads not in (32, 64):
            raise UnsupportedGraphError(f"{len(temperature)} heads of {C} channels; a head has to have 32 or 64")
        v, v_bias = self._plus_constant(v)
        new_k, new_v = self._unit(k), graph.follow("Reshape", v, None)
        layer = _layer(new_k, "new_k_")
        if _layer(new_v, "new_v_") != layer:
            raise UnsupportedGraphError(f"{new_k} with {new_v}")
        q, k, v = (
            graph.follow("Reshape", one, None)
            for one in (scaled.output[0], self._with_past(new_k), self._with_past(new_v))
        )
        scores = graph.follow(
            "MatMul", graph.follow("Transpose", q, perm=[1, 0, 2]), graph.follow("Transpose", k, perm=[1, 2, 0])
        )
        weights = graph.follow("Softmax", scores, axis=-1)
        out = graph.follow("MatMul", weights, graph.follow("Transpose", v, perm=[1, 0, 2]))
        out = graph.follow("Reshape", graph.follow("Transpose", out, perm=[1, 0, 2]), None)
        if (q_bias.shape, v_bias.shape) != ((C,), (C,)):
            raise UnsupportedGraphError(f"biases {q_bias.shape} and {v_bias.shape} of queries and values")
        bias = np.concatenate([floats(q_bias), floats(v_bias)])
        return Linear(matrix=matrix, bias=bias), temperature, layer, out

    def _unit(self, x: str) -> str:
        """x of each head ÷ its length."""
        graph = self._graph
        heads = graph.follow("Reshape", x, None)
        length = graph.reader("ReduceL2", heads, None, keepdims=1)
        clamped = graph.reader("Clip", length.output[0], None)
        if graph.constant(length.input[1]).tolist() != [-1] or not np.isclose(graph.number(clamped.input[1]), 1e-12):
            raise UnsupportedGraphError(f"{length.output[0]} is not the length that is divided by")
        return graph.follow("Div", heads, clamped.output[0])

    def _with_past(self, new: str) -> str:
        return self._graph.follow("Concat", new.replace("new_", "past_"), new, axis=0)

    def _fusion(self, x: str, c: str) -> tuple[Fusion, str]:
        graph = self._graph
        norm = graph.reader("LayerNormalization", graph.follow("Concat", x, c, axis=-1), None, None, axis=-1)
        self._eps.add(self._epsilon(norm))
        weight, bias = (floats(graph.constant(name)) for name in norm.input[1:])
        linear, x = self._linear(norm.output[0], self._width, 2 * self._width)
        if (weight.shape, bias.shape) != ((2 * self._width,), (2 * self._width,)):
            raise UnsupportedGraphError(f"a fusion's norm has weights {weight.shape}")
        return Fusion(kind="concat", weight=weight, bias=bias, linear=linear), x

    def _modulated(self, x: str, scale: int, shift: int) -> str:
        """LN(x)·(1 + scale) + shift."""
        graph = self._graph
        norm = graph.reader("LayerNormalization", x, None, axis=-1)
        self._eps.add(self._epsilon(norm))
        if len(norm.input) > 2 or (graph.constant(norm.input[1]) != 1).any():
            raise UnsupportedGraphError(f"{norm.output[0]} has weights of its own")
        factor = graph.reader("Add", self._rows[scale], None)
        if graph.number(factor.input[1]) != 1:
            raise UnsupportedGraphError(f"{factor.output[0]} is not 1 + scale")
        return self._sum(self._times(norm.output[0], factor.output[0]), self._rows[shift])

    def _linear(self, x: str, outputs: int | None, inputs: int) -> tuple[Linear, str]:
        """x·Wᵀ + b, of so many outputs (None: any number)."""
        graph = self._graph
        node = graph.reader("MatMul", x, None)
        matrix = graph.constant(node.input[1]).T
        y, bias = self._plus_constant(node.output[0])
        if matrix.shape != (outputs or len(matrix), inputs) or bias.shape != matrix.shape[:1]:
            raise UnsupportedGraphError(
                f"a matrix {matrix.shape} and a bias {bias.shape} where {inputs} inputs come in"
            )
        return Linear(matrix=matrix, bias=floats(bias)), y

    def _guided(self, logits: str) -> None:
        """(1 + t)·(the first rows) − t·(the last ones) are the graph's `logits`."""
        graph = self._graph
        t = self._times("cfg", "cfg_ratio")
        more = graph.reader("Add", t, None)
        difference = graph.producer(graph.producer("logits", "Reshape").input[0], "Sub")
        with_, without = (graph.producer(name, "Mul") for name in difference.input)
        factors = (t, more.output[0])
        names = [name for node in (with_, without) for name in node.input if name not in factors]
        rows = [graph.producer(name, "Slice") for name in names]
        known = graph.number(more.input[1]) == 1 and more.output[0] in with_.input and t in without.input
        if not known or [node.input[0] for node in rows] != [logits, logits] or self._first_row(rows[0]) != 0:
            raise UnsupportedGraphError("logits are not (1 + t)·conditional − t·unconditional")

    def _first_row(self, node: Node) -> int:
        return int(self._graph.constant(node.input[1]).item())

    @staticmethod
    def _epsilon(norm: Node) -> float:
        value = norm.attributes.get("epsilon", 1e-5)
        if not isinstance(value, float):
            raise UnsupportedGraphError(f"{norm.output[0]} has an epsilon {value!r}")
        return value

    def _plus_constant(self, x: str) -> tuple[str, NDArray[Any]]:
        node = self._graph.reader("Add", x, None)
        return node.output[0], self._graph.constant(node.input[1])

    def _sum(self, a: str, b: str) -> str:
        return self._graph.follow("Add", a, b)

    def _times(self, a: str, b: str) -> str:
        return self._graph.follow("Mul", a, b)


def _layer(name: str, prefix: str) -> int:
    if not name.startswith(prefix) or not name.removeprefix(prefix).isdecimal():
        raise UnsupportedGraphError(f"{name} is not the output {prefix}…")
    return int(name.removeprefix(prefix))
