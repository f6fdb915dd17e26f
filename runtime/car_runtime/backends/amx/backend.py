"""Base, branches, control encoders and decoder in kernels of our own, for CPUs with AMX, and OpenVINO for the rest.

The kernels take about half as long as OpenVINO: weights lie in huge pages in the order in which they are multiplied,
and what comes before and after a matrix product is fused with it. What isn't multiplied, such as the residual stream
and the decoder's feature maps, stays in float32. The condition and the sampling of tokens are OpenVINO's, as in the
backend `openvino`, and so are encoders and branches of other architectures than the published ones.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from car_runtime.backends.amx import build
from car_runtime.backends.amx.convnet import Convnet, ConvnetBuffers, Sizes
from car_runtime.backends.amx.description import Fusion, Linear, UnsupportedGraphError
from car_runtime.backends.amx.description import Transformer as TransformerGraph
from car_runtime.backends.amx.memory import Workspace
from car_runtime.backends.amx.parameters import named_base, named_branch, named_decoder, named_encoder
from car_runtime.backends.amx.spec import BF16_TERMS
from car_runtime.backends.amx.transformer import Arrays, PackedFusions, Transformer
from car_runtime.backends.base import Buffer
from car_runtime.backends.numpy_buffers import array_of, pages_forgotten
from car_runtime.backends.openvino.backend import Compiled, OpenVino
from car_runtime.backends.openvino.graphs import LOGITS, keep_cache_in_bfloat16, split_at_sort
from car_runtime.errors import BackendError, one_line
from car_runtime.format.manifest import WEIGHTS, Manifest
from car_runtime.format.parameters import plan_parameters
from car_runtime.format.schema import FUSIONS
from car_runtime.system.cpu import physical_cores

MIXES = 4
"""Mixes of branches whose fusions are kept packed."""


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
        try:
            self._parameters = plan_parameters(manifest, root)
        except UnsupportedGraphError as error:
            raise BackendError(f"{self.name!r} finds no weights: {one_line(error)}") from error
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
        """The step is our transformer and OpenVINO's model of what comes after it. The rest is ours where known."""
        kind, _, branch = graph.partition(".")
        if kind not in ("control", "decoder", "branch", "step"):
            return super()._compile(graph)
        made: Compiled | None = None
        try:
            with pages_forgotten(self._root / WEIGHTS):
                if kind == "step":
                    made = self._step()
                elif kind == "branch":
                    made = self._branch(branch)
                else:
                    made = self._convnet(graph, branch)
        except (UnsupportedGraphError, MemoryError) as error:
            if kind == "step":
                raise BackendError(
                    f"{self.name!r} cannot run the plan's step ({one_line(error)}); export the plan again, "
                    "or use --backend openvino"
                ) from error
            return super()._compile(graph)  # OpenVINO takes longer for it, and no more
        if kind == "step":
            drawing = super()._compile(graph)
            if not drawing.parts:
                raise BackendError(f"{self.name!r} wants a step that sorts its logits; use --backend openvino")
            made = Compiled([*made.parts, *drawing.parts], drawing.owners)
        self._own.append(graph)
        return made

    def _step(self) -> Compiled:
        """The base's transformer. UnsupportedGraphError if it is of another kind."""
        model = self._manifest.model
        fused = next((one.blocks for one in model.branches.values()), 0)
        sizes = {"depth": model.depth, "width": model.width, "heads": model.heads, "fused": fused}
        base = named_base(self._parameters.under("base."), **sizes)
        self._check(base)
        mixes = _Mixes(self._library, self._manifest, self._cores)
        part = partial(_StepPart, Transformer(self._library, base, self._cores), mixes, self._library, model.vocab)
        return Compiled([part], ())

    def _branch(self, name: str) -> Compiled:
        """A branch's transformer. UnsupportedGraphError if it is of another kind."""
        model, parameters = self._manifest.model, self._parameters
        sizes = {"blocks": model.branches[name].blocks, "width": model.width, "heads": model.heads}
        branch = named_branch(parameters.under(f"branches.{name}."), **sizes)
        return Compiled([partial(_BranchPart, Transformer(self._library, branch, self._cores), self._library)], ())

    def _convnet(self, graph: str, branch: str) -> Compiled:
        """A control encoder or the decoder. UnsupportedGraphError if it is of another kind than we know."""
        ports = self._manifest.graphs[graph]
        part: type[_EncoderPart] | type[_DecoderPart]
        if graph != "decoder":
            model, sides = self._manifest.model, [_size(port.shape[0]) for port in ports.inputs]
            network = named_encoder(self._parameters.under(f"branches.{branch}."), model.width, model.patch)
            part, (tokens, channels) = _EncoderPart, map(_size, ports.output("features").shape)
        else:
            _, channels, *sides = map(_size, ports.input("f_hat").shape[:3])
            network, part = named_decoder(self._parameters.under("vqvae."), channels), _DecoderPart
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

    def _check(self, base: TransformerGraph) -> None:
        """Raise UnsupportedGraphError unless weights and manifest agree, by which the loop's buffers are sized."""
        model = self._manifest.model
        rows = self._manifest.graphs["condition"].output("modulation").shape[1]
        says = (model.width, model.heads, model.vocab, model.cache_layers, rows)
        vocab = 0 if base.head is None else len(base.head.matrix)
        if (base.width, base.heads, vocab, base.layers, base.modulation_rows) != says:
            raise UnsupportedGraphError("it is not of the manifest's width, heads, codes, layers or modulation")


class AmxFp32(Amx):
    """The `amx-fp32` backend: factors are sums of two bf16 values, 17 bits; the rest is float32.

    Each matrix product is three of bf16, which takes less than half of the time that float32's own does.
    """

    name = "amx-fp32"
    bf16_terms = BF16_TERMS[name]


class _Mixes:
    """The fusions of the branches that a step mixes in, packed when they are first used; the latest are kept."""

    def __init__(self, library: Any, manifest: Manifest, cores: int) -> None:
        self._library, self._cores, self._width = library, cores, manifest.model.width
        one = next(iter(manifest.model.branches.values()), None)
        self._kind, self._blocks = ("", 0) if one is None else (one.fusion, one.blocks)
        self._lock = Lock()
        self._kept: OrderedDict[tuple[int, ...], tuple[Any, PackedFusions]] = OrderedDict()

    def of(self, inputs: Arrays) -> PackedFusions | None:
        """Of a step's inputs `fusion_NAME_i`, whose numbers never change; None where all weights are 0."""
        if not self._blocks or not inputs["mix"].any():
            return None
        names = FUSIONS[self._kind]
        given = [[inputs[f"fusion_{name}_{i}"] for name in names] for i in range(self._blocks)]
        key = tuple(id(array) for arrays in given for array in arrays)
        with self._lock:
            if key not in self._kept:
                # The arrays are kept too: so nobody else gets their numbers.
                self._kept[key] = (given, self._packed([dict(zip(names, some, strict=True)) for some in given]))
            self._kept.move_to_end(key)
            while len(self._kept) > MIXES:
                self._kept.popitem(last=False)
            return self._kept[key][1]

    def _packed(self, given: Sequence[Arrays]) -> PackedFusions:
        mixed = len(next(iter(given[0].values())))
        fusions = [
            _fusion(self._kind, {name: a[i] for name, a in one.items()}) for i in range(mixed) for one in given
        ]
        return PackedFusions(self._library, fusions, mixed, self._width, self._cores)


def _fusion(kind: str, given: Arrays) -> Fusion:
    """𝓖 of one branch before one block, from a step's inputs."""
    linear = None
    if "linear_weight" in given:
        linear = Linear(matrix=given["linear_weight"].T, bias=given["linear_bias"])
    weight = given.get("gain", given.get("norm_weight"))
    return Fusion(kind=kind, linear=linear, weight=weight, bias=given.get("norm_bias"))


class _StepPart:
    """A base's transformer, with the workspace of one call after the other."""

    def __init__(self, transformer: Transformer, mixes: _Mixes, library: Any, vocab: int) -> None:
        self._transformer, self._mixes = transformer, mixes
        self._workspace, self._vocab = Workspace(library), vocab
        self._logits = np.empty(0, np.float32)

    def run(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> NDArray[np.float32]:
        """See `openvino.Part`; the logits that are returned have `bias` added."""
        arrays, given = ({name: array_of(buffer) for name, buffer in some.items()} for some in (inputs, outputs))
        if LOGITS not in given:  # nobody asked for them
            shape = (*arrays["uniforms"].shape, self._vocab)
            if self._logits.size < np.prod(shape):
                self._logits = np.empty(np.prod(shape), np.float32)
            given[LOGITS] = self._logits[: np.prod(shape)].reshape(shape)
        self._transformer.run_step(arrays, given, self._workspace, self._mixes.of(arrays))
        bias, logits = arrays["bias"], given[LOGITS]
        return logits + bias if bias.any() else logits


class _BranchPart:
    """A branch's transformer, with the workspace of one call after the other."""

    def __init__(self, transformer: Transformer, library: Any) -> None:
        self._transformer, self._workspace = transformer, Workspace(library)

    def run(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        """See `openvino.Part`."""
        arrays, given = ({name: array_of(buffer) for name, buffer in some.items()} for some in (inputs, outputs))
        self._transformer.run_branch(arrays, given, self._workspace)


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
