"""OpenVINO on the CPU: the plan's own graphs, in bfloat16 where the CPU multiplies it (AMX, AVX-512 BF16).

The step uses the graph with named dimensions: one compiled model serves all scales, so the packed weights are
resident once. Buffers are numpy arrays that OpenVINO reads and writes in place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

from car_runtime.backends import Buffer
from car_runtime.backends.host import HostMemory, array_of, available_cores
from car_runtime.errors import BackendError, PlanError, RunError, one_line
from car_runtime.manifest import Manifest

# The encoder serves editing only; it is compiled when somebody encodes.
_AT_ONCE = ("step", "condition", "control", "decoder")


class OpenVino(HostMemory):
    """The `openvino` backend."""

    name = "openvino"

    def __init__(
        self, root: Path, manifest: Manifest, threads: int | None = None, precision: str | None = None
    ) -> None:
        """`precision`: "f32" or "bf16", what is multiplied in; by default bf16 where the CPU has it."""
        self._ov = _import_openvino()
        self._root, self._manifest = root, manifest
        self._core = self._ov.Core()
        if "CPU" not in self._core.available_devices:
            raise BackendError("OpenVINO finds no CPU plugin; pip install --force-reinstall openvino")
        if manifest.precision.compute != "fp32":
            raise BackendError(
                f"the plan computes in {manifest.precision.compute}, but OpenVINO wants float32 plans and chooses "
                "the type itself; export it with --precision fp32 (--weights fp16 keeps it small), or use ort-cpu"
            )
        bf16 = "BF16" in self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        self.precision = precision or ("bf16" if bf16 else "f32")
        self._settings: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": self.precision,
            "INFERENCE_NUM_THREADS": threads or available_cores(),
            # Fused attention gives wrong values for named dimensions (2026.4, from 30 keys on).
            "SNIPPETS_MODE": "DISABLE",
        }
        self._lock = Lock()
        self._closed = False
        self._inputs = {name: {port.name for port in graph.inputs} for name, graph in manifest.graphs.items()}
        names = [name for name in _AT_ONCE if name in manifest.graphs]
        with ThreadPoolExecutor(len(names)) as pool:
            self._models = dict(zip(names, pool.map(self._compile, names), strict=True))
        self._idle: dict[tuple[str, frozenset[str]], list[Any]] = {}

    def step_graph(self, scale: int, batch: int) -> str:
        """Always the graph with named dimensions."""
        return "step"

    def run(self, graph: str, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        """Run `graph` on the arrays as they lie in memory. Each call has an inference request of its own."""
        wanted = self._inputs[graph]
        with self._request(graph, frozenset(outputs)) as request:
            try:
                for name, buffer in inputs.items():
                    if name in wanted:
                        request.set_tensor(name, self._tensor(buffer))
                for name, buffer in outputs.items():
                    request.set_tensor(name, self._tensor(buffer))
                request.infer()
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

    def _tensor(self, buffer: Buffer) -> Any:
        array = array_of(buffer)
        if array.size == 0:  # the first scale's past: OpenVINO shares no empty memory
            return self._ov.Tensor(self._ov.Type(array.dtype), self._ov.Shape(array.shape))
        return self._ov.Tensor(array, shared_memory=True)

    @contextmanager
    def _request(self, graph: str, outputs: frozenset[str]) -> Iterator[Any]:
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
            request = idle.pop() if idle else self._models[graph].create_infer_request()
        yield request  # after an error it is not used again
        with self._lock:
            idle.append(request)

    def _compile(self, graph: str) -> Any:
        file = self._manifest.graphs[graph].file
        try:
            return self._core.compile_model(str(self._root / file), "CPU", self._settings)
        except Exception as error:
            raise PlanError(
                f"OpenVINO {self._ov.__version__} cannot compile {file}: {one_line(error)}; "
                "export the plan again, or use --backend ort-cpu"
            ) from error


def _import_openvino() -> Any:
    try:
        import openvino
    except Exception as error:
        raise BackendError(
            f"the backend 'openvino' needs OpenVINO ({one_line(error)}); run: pip install 'car-deploy[openvino]'"
        ) from error
    return openvino
