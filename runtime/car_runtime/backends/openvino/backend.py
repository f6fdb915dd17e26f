"""OpenVINO on the CPU: the plan's own graphs, in bfloat16 where the CPU multiplies it (AMX, AVX-512 BF16).

The step uses the graph with named dimensions: one compiled model serves all scales, so the packed weights are
resident once. It is rewritten first (`openvino_graphs`), and cut in two where it sorts, which numpy does faster.
Buffers are numpy arrays that OpenVINO reads and writes in place; K and V are kept in the type that is multiplied in.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from car_runtime.backends.base import Buffer
from car_runtime.backends.numpy_buffers import NumpyBuffers, array_of, pages_forgotten
from car_runtime.backends.openvino.core import openvino_core
from car_runtime.backends.openvino.graphs import (
    BIASED,
    LOGITS,
    RANKED,
    fuse_unit_length,
    keep_cache_in_bfloat16,
    keep_maps_channels_last,
    multiply_matrices_as_stored,
    split_at_sort,
    split_products,
    transpose_in_products,
)
from car_runtime.backends.openvino.spec import OPENVINO
from car_runtime.errors import BackendError, PlanError, RunError, one_line
from car_runtime.format.manifest import WEIGHTS, Manifest
from car_runtime.system.cpu import engine_threads

# The encoder serves editing only; it is compiled when somebody encodes.
_AT_ONCE = ("step", "condition", "control", "decoder")
ROWS = 64
"""Tokens whose logits are sorted at once, a megabyte of 4096."""


class OpenVino(NumpyBuffers):
    """The `openvino` backend."""

    name = "openvino"

    def __init__(
        self, root: Path, manifest: Manifest, threads: int | None = None, precision: str | None = None
    ) -> None:
        """`precision`: "f32" or "bf16", what is multiplied in; by default bf16 where the CPU has it."""
        self._ov = _import_openvino()
        self._root, self._manifest = root, manifest
        try:
            self._core = openvino_core()
            capabilities = self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        except Exception as error:
            raise BackendError(
                f"OpenVINO finds no CPU plugin ({one_line(error)}); pip install --force-reinstall openvino"
            ) from error
        if manifest.precision.compute != "fp32":
            raise BackendError(
                f"the plan computes in {manifest.precision.compute}, but OpenVINO wants float32 plans and chooses "
                "the type itself; export it with --precision fp32 (--weights fp16 keeps it small), or use ort-cpu"
            )
        self.precision = precision or ("bf16" if "BF16" in capabilities else "f32")
        self.cache_dtype = "bfloat16" if self.precision == "bf16" else None
        self._settings: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": self.precision,
            "INFERENCE_NUM_THREADS": threads or engine_threads(),
            # What fuses attention into one kernel computes it wrongly for named dimensions, once there are more keys
            # than when the kernel was made (2026.4).
            "SNIPPETS_MODE": "DISABLE",
        }
        self._pool = ThreadPoolExecutor(self._settings["INFERENCE_NUM_THREADS"] or os.cpu_count())
        """Sorts logits while the engine's threads wait."""
        self._lock = Lock()
        self._closed = False
        # One after the other: together they are no faster, and the weights of all would be mapped at once.
        self._models = {name: self._compile(name) for name in _AT_ONCE if name in manifest.graphs}
        self._idle: dict[tuple[str, frozenset[str]], list[_Request]] = {}

    def step_graph(self, scale: int, batch: int) -> str:
        """Always the graph with named dimensions."""
        return "step"

    def run(self, graph: str, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        """Run `graph` on the arrays as they lie in memory. Each call has an inference request of its own."""
        with self._request(graph, frozenset(outputs)) as request:
            try:
                request.infer(inputs, outputs)
            except Exception as error:
                raise RunError(f"OpenVINO failed in the graph {graph!r}: {one_line(error)}") from error

    def report(self) -> dict[str, Any]:
        """OpenVINO's version, the type that it multiplies in, and its threads."""
        threads = self._settings["INFERENCE_NUM_THREADS"]
        return {"engine": f"openvino {self._ov.__version__}", "precision": self.precision, "threads": threads}

    def close(self) -> None:
        """Drop the compiled models; what still runs keeps its own until it is done."""
        with self._lock:
            self._closed = True
            self._models, self._idle = {}, {}

    @contextmanager
    def _request(self, graph: str, outputs: frozenset[str]) -> Iterator[_Request]:
        """An inference request for this call alone, kept for the next one: it owns the activations.

        One that was given an output writes to the same memory until it is given another: so it is kept for calls that
        give it the same ones.
        """
        with self._lock:
            if self._closed:
                raise RunError("the plan was closed while it was in use; keep it open until all calls return")
            if graph not in self._models:
                self._models[graph] = self._compile(graph)
            idle = self._idle.setdefault((graph, outputs), [])
            request = idle.pop() if idle else _Request(self._models[graph], self._pool)
        if request.used:
            yield request  # after an error it is not used again
        else:  # OpenVINO packs a graph's weights when it first runs
            with pages_forgotten(self._root / WEIGHTS):
                yield request
            request.used = True
        with self._lock:
            idle.append(request)

    def _compile(self, graph: str) -> Compiled:
        """One compiled model; the step as two, with its sort between them."""
        file = self._manifest.graphs[graph].file
        try:
            with pages_forgotten(self._root / WEIGHTS):
                model = self._core.read_model(str(self._root / file))
                models, owners = self._rewrite(graph, model)
                parts = [self._core.compile_model(part, "CPU", self._settings) for part in models]
        except Exception as error:
            raise PlanError(
                f"OpenVINO {self._ov.__version__} cannot compile {file}: {one_line(error)}; "
                "export the plan again, or use --backend ort-cpu"
            ) from error
        return Compiled([partial(EnginePart, self._ov, part) for part in parts], owners)

    def _rewrite(self, graph: str, model: Any) -> tuple[Sequence[Any], Sequence[Any]]:
        """The parts of a graph as they are compiled, and what owns memory that they read."""
        multiply_matrices_as_stored(self._ov, model)
        owners = split_products(self._ov, model)
        keep_maps_channels_last(self._ov, model)
        if graph != "step" and not graph.startswith("branch."):
            return (model,), owners
        transpose_in_products(self._ov, model)
        fuse_unit_length(self._ov, model)
        if self.cache_dtype is not None:
            model = keep_cache_in_bfloat16(self._ov, model)
        if graph != "step":
            return (model,), owners
        return split_at_sort(self._ov, model) or (model,), owners


class Part(Protocol):
    """What makes a part of a graph's outputs; one call at a time."""

    def run(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> NDArray[np.float32] | None:
        """Take what it needs of the inputs, write what it makes of the outputs; the logits, if it makes them."""
        ...


class Compiled(NamedTuple):
    """What makes a graph's parts, one after the other, and what owns memory that they read, as long as they are."""

    parts: Sequence[Callable[[], Part]]
    owners: Sequence[Any]


class _Request:
    """A graph's parts for one call after the other."""

    def __init__(self, compiled: Compiled, pool: Executor) -> None:
        self._compiled, self._pool = compiled, pool
        self.used = False
        self._parts = [make() for make in compiled.parts]

    def infer(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        """Run the parts one after the other: of a step, first up to its logits, then the rest on the sorted ones."""
        between: dict[str, Buffer] = {}
        for part in self._parts:
            logits = part.run({**inputs, **between}, outputs)
            if logits is not None and len(self._parts) > 1:
                between = {LOGITS: logits, BIASED: logits, RANKED: descending(logits, self._pool)}


class EnginePart:
    """An inference request of a compiled model."""

    def __init__(self, ov: Any, model: Any) -> None:
        self._ov, self.model = ov, model
        self._request = model.create_infer_request()
        self._takes, self._gives = _ports(model.inputs), _ports(model.outputs)

    def run(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> NDArray[np.float32] | None:
        """See `Part`."""
        for ports, buffers in ((self._takes, inputs), (self._gives, outputs)):
            for name, buffer in buffers.items():
                if name in ports:
                    self._request.set_tensor(ports[name], self._tensor(buffer, ports[name]))
        self._request.infer()
        wanted = BIASED if BIASED in self._gives else LOGITS
        if wanted not in self._gives:
            return None
        logits: NDArray[np.float32] = self._request.get_tensor(self._gives[wanted]).data
        return logits

    def _tensor(self, buffer: Buffer, port: Any) -> Any:
        array, element = array_of(buffer), port.get_element_type()
        if array.size == 0:  # the first scale's past: OpenVINO shares no empty memory
            return self._ov.Tensor(element, self._ov.Shape(array.shape))
        if element == self._ov.Type.bf16 or not array.flags.writeable:  # numpy lacks the one, what is mapped is read
            return self._ov.Tensor(array, self._ov.Shape(array.shape), element)
        return self._ov.Tensor(array, shared_memory=True)


def descending(values: NDArray[np.float32], pool: Executor) -> NDArray[np.float32]:
    """A sorted copy, the largest of the last axis first; a block of rows at a time, as many as fit into a cache."""
    ranked = np.empty_like(values)
    rows, sorted_rows = (array.reshape(-1, array.shape[-1]) for array in (values, ranked))

    def sort(start: int) -> None:
        block = sorted_rows[start : start + ROWS]
        np.negative(rows[start : start + ROWS], out=block)
        block.sort(-1)
        np.negative(block, out=block)

    if len(rows) <= ROWS:
        sort(0)
    else:
        list(pool.map(sort, range(0, len(rows), ROWS)))
    return ranked


def _ports(ports: Sequence[Any]) -> dict[str, Any]:
    """Each port by all of its names."""
    return {name: port for port in ports for name in port.get_names()}


def _import_openvino() -> Any:
    try:
        import openvino
    except Exception as error:
        raise BackendError(
            f"the backend 'openvino' needs OpenVINO ({one_line(error)}); run: {OPENVINO.install[0]}"
        ) from error
    return openvino
