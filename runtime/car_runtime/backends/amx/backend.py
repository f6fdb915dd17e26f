"""Transformer, control encoder and decoder in kernels of our own, for CPUs with AMX, and OpenVINO for the rest.

The kernels take about half as long as OpenVINO: weights lie in huge pages in the order in which they are multiplied,
and what comes before and after a matrix product is fused with it. What isn't multiplied, such as the residual stream
and the decoder's feature maps, stays in float32. The condition and the sampling of tokens are OpenVINO's, as in the
backend `openvino`, and so are an encoder and a decoder of another architecture than the published one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from car_runtime.backends.amx import build
from car_runtime.backends.amx.convnet import Convnet, ConvnetBuffers, Sizes
from car_runtime.backends.amx.convolutions import read_decoder, read_encoder
from car_runtime.backends.amx.description import Transformer as TransformerGraph
from car_runtime.backends.amx.description import UnsupportedGraphError
from car_runtime.backends.amx.match_transformer import read_step
from car_runtime.backends.amx.memory import Workspace
from car_runtime.backends.amx.spec import BF16_TERMS
from car_runtime.backends.amx.transformer import Transformer
from car_runtime.backends.base import Buffer
from car_runtime.backends.numpy_buffers import array_of, pages_forgotten
from car_runtime.backends.openvino.backend import Compiled, OpenVino
from car_runtime.backends.openvino.graphs import LOGITS, keep_cache_in_bfloat16, split_at_sort
from car_runtime.errors import BackendError, one_line
from car_runtime.format.manifest import WEIGHTS, Manifest
from car_runtime.system.cpu import physical_cores


class Amx(OpenVino):
    """The `amx` backend."""

    name = "amx"
    bf16_terms = BF16_TERMS[name]
    """How many bf16 values stand for a number."""

    def __init__(self, root: Path, manifest: Manifest, threads: int | None = None) -> None:
        if manifest.precision.compute != "fp32" or manifest.precision.weights == "int8":
            types = "int8" if manifest.precision.weights == "int8" else manifest.precision.compute
            raise BackendError(
                f"the plan multiplies in {types}, but {self.name!r} wants float32 plans; use another backend"
            )
        build.check_cpu(self.name)
        self._library = build.load(self.bf16_terms)
        self._cores = threads or physical_cores()
        self._own: list[str] = []
        super().__init__(root, manifest, threads, "bf16" if self.bf16_terms == 1 else "f32")

    def report(self) -> dict[str, Any]:
        """OpenVINO's version, the type that is multiplied in, the threads, and which graphs are in our own code."""
        engine = f"{self.name}, openvino {self._ov.__version__}"
        return {**super().report(), "engine": engine, "threads": self._cores, "own": sorted(self._own)}

    def _compile(self, graph: str) -> Compiled:
        """The step is our transformer, and OpenVINO's model of what comes after it; convnets where we know them."""
        if graph in ("control", "decoder"):
            try:
                with pages_forgotten(self._root / WEIGHTS):
                    compiled = self._convnet(graph)
            except (UnsupportedGraphError, MemoryError):  # OpenVINO takes longer for it, and no more
                return super()._compile(graph)
            self._own.append(graph)
            return compiled
        if graph != "step":
            return super()._compile(graph)
        file = self._root / self._manifest.graphs[graph].file
        try:
            with pages_forgotten(self._root / WEIGHTS):
                step = read_step(file, self._root / WEIGHTS)
                self._check(step)
                transformer = Transformer(self._library, step, self._cores)
        except (UnsupportedGraphError, MemoryError) as error:
            raise BackendError(
                f"{self.name!r} cannot run the plan's step ({one_line(error)}); export the plan again, "
                "or use --backend openvino"
            ) from error
        drawing = super()._compile(graph)
        if not drawing.parts:
            raise BackendError(f"{self.name!r} wants a step that sorts its logits; use --backend openvino")
        self._own.append(graph)
        first = partial(_TransformerPart, transformer, self._library, self._manifest.model.vocab)
        return Compiled([first, *drawing.parts], drawing.owners)

    def _convnet(self, graph: str) -> Compiled:
        """The control encoder or the decoder. UnsupportedGraphError if it is of another kind than we know."""
        ports, weights = self._manifest.graphs[graph], self._root / WEIGHTS
        part: type[_EncoderPart] | type[_DecoderPart]
        if graph == "control":
            sides = [_size(port.shape[0]) for port in ports.inputs]
            network, part = read_encoder(self._root / ports.file, weights, tuple(sides)), _EncoderPart
            tokens, channels = map(_size, ports.output("features").shape)
        else:
            _, channels, *sides = map(_size, ports.input("f_hat").shape[:3])
            network, part = read_decoder(self._root / ports.file, weights, channels, sides[0]), _DecoderPart
            _, height, width, channels = map(_size, ports.output("image").shape)
            tokens = height * width
        convnet, sizes = Convnet(self._library, network, self._cores), tuple((side, side) for side in sides)
        made = ConvnetBuffers(convnet, sizes).sizes
        if (sum(h * w for h, w in made), network.channels[-1]) != (tokens, channels):
            raise UnsupportedGraphError("what comes out is not of the manifest's size")
        return Compiled([partial(part, convnet, sizes)], ())

    def _rewrite(self, graph: str, model: Any) -> tuple[Sequence[Any], Sequence[Any]]:
        """Keep of the step only what draws from the sorted logits; nothing if it isn't cut there."""
        if graph != "step":
            return super()._rewrite(graph, model)
        if self.cache_dtype is not None:
            model = keep_cache_in_bfloat16(self._ov, model)
        parts = split_at_sort(self._ov, model)  # it looks at the cache's shapes
        return (() if parts is None else parts[1:]), ()

    def _check(self, step: TransformerGraph) -> None:
        """Raise UnsupportedGraphError unless graph and manifest agree: the loop's buffers are sized by the latter."""
        model = self._manifest.model
        rows = self._manifest.graphs["condition"].output("modulation").shape[1]
        layers = len(step.base) + len(step.branch)
        says = (model.width, model.heads, model.vocab, model.cache_layers, rows)
        if (step.width, step.heads, len(step.head.matrix), layers, step.modulation_rows) != says:
            raise UnsupportedGraphError("it is not of the manifest's width, heads, codes, layers or modulation")


class AmxFp32(Amx):
    """The `amx-fp32` backend: factors are sums of two bf16 values, 17 bits; the rest is float32.

    Each matrix product is three of bf16, which takes less than half of the time that float32's own does.
    """

    name = "amx-fp32"
    bf16_terms = BF16_TERMS[name]


class _TransformerPart:
    """The transformer with the workspace of one call after the other."""

    def __init__(self, transformer: Transformer, library: Any, vocab: int) -> None:
        self._transformer, self._vocab = transformer, vocab
        self._workspace = Workspace(library)
        self._logits = np.empty(0, np.float32)

    def run(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> NDArray[np.float32]:
        """See `openvino.Part`."""
        given = {name: array_of(buffer) for name, buffer in outputs.items()}
        if LOGITS not in given:
            shape = (*array_of(inputs["uniforms"]).shape, self._vocab)
            if self._logits.size < np.prod(shape):
                self._logits = np.empty(np.prod(shape), np.float32)
            given[LOGITS] = self._logits[: np.prod(shape)].reshape(shape)
        self._transformer.run({name: array_of(buffer) for name, buffer in inputs.items()}, given, self._workspace)
        return given[LOGITS]


class _EncoderPart:
    """The control encoder with the memory of one call after the other."""

    def __init__(self, convnet: Convnet, sizes: Sizes) -> None:
        self._buffers, self._scales = ConvnetBuffers(convnet, sizes), range(len(sizes))

    def run(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        """See `openvino.Part`."""
        for k in self._scales:
            self._buffers.pixels(k)[:] = array_of(inputs[f"control_{k}"])
        self._buffers.run()
        features, start = array_of(outputs["features"]), 0
        for k in self._scales:
            blocks = self._buffers.output(k)
            tokens = blocks.reshape(len(blocks), -1, blocks.shape[-1]).transpose(1, 0, 2)
            end = start + len(tokens)
            features[start:end] = tokens.reshape(len(tokens), -1)[:, : features.shape[1]]  # without those that pad
            start = end


class _DecoderPart:
    """The decoder with the memory of one call after the other."""

    def __init__(self, convnet: Convnet, sizes: Sizes) -> None:
        self._buffers = ConvnetBuffers(convnet, sizes)

    def run(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        """See `openvino.Part`."""
        x = self._buffers.input(0)
        for f_hat, image in zip(array_of(inputs["f_hat"]), array_of(outputs["image"]), strict=True):
            for block in range(len(x)):
                channels = f_hat[32 * block : 32 * block + 32]
                x[block, :, :, : len(channels)] = channels.transpose(1, 2, 0)
            self._buffers.run(image[None])


def _size(dimension: int | str) -> int:
    """A dimension's size; 1 for a named one, which is the batch."""
    return dimension if isinstance(dimension, int) else 1
