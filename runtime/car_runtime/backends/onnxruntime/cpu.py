"""ONNX Runtime on the CPU: one session per graph, buffers are numpy arrays that the engine reads and writes in place.

The step uses the graph with named dimensions: one session serves all scales, so the weights are resident once, and at
d16 it was measured to be as fast as static sessions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from car_runtime.backends.base import Buffer
from car_runtime.backends.numpy_buffers import NumpyBuffers, array_of
from car_runtime.backends.onnxruntime.session import import_onnxruntime, needless_optimizers
from car_runtime.backends.onnxruntime.spec import CPU_PROVIDER, ORT_CPU
from car_runtime.errors import BackendError, PlanError, RunError, one_line
from car_runtime.format.folder import PlanFolder, map_file
from car_runtime.format.graph_check import GRAPH_BYTES, stored_weights
from car_runtime.format.manifest import WEIGHTS, Manifest
from car_runtime.system.cpu import cpu_flags, engine_threads

# The encoder serves editing only; it is opened when somebody encodes.
BY_DESCRIPTOR_BYTES = 64 * 1024 * 1024
"""Of weights up to this size a session is given the bytes that were hashed. It copies some of them while it opens, up
to 84 MB more at 65 MB of weights; larger plans are opened by name."""
_GIVES_WEIGHTS = "add_external_initializers"
_DTYPES: dict[int, Any] = {
    1: np.float32, 2: np.uint8, 3: np.int8, 6: np.int32, 7: np.int64, 9: np.bool_, 10: np.float16
}  # fmt: skip
"""ONNX's number of a type → numpy's."""
_AT_ONCE = ("step", "condition", "control", "decoder")


class OrtCpu(NumpyBuffers):
    """The `ort-cpu` backend."""

    name = "ort-cpu"

    def __init__(
        self, root: Path, manifest: Manifest, threads: int | None = None, folder: PlanFolder | None = None
    ) -> None:
        """`folder`: the plan's files as they were checked, in place of those that `root` has by now."""
        if manifest.precision.compute == "bf16":
            raise BackendError(
                "the plan computes in bfloat16, which onnxruntime cannot on a CPU; "
                "run it with --backend rtx, or export it with --precision fp16 or fp32"
            )
        self._ort = import_onnxruntime(ORT_CPU, "onnxruntime", ("cpu", "gpu"))
        self._root, self._manifest, self._threads = root, manifest, threads or engine_threads()
        by_descriptor = manifest.files[WEIGHTS].bytes <= BY_DESCRIPTOR_BYTES
        self._folder = folder if by_descriptor and hasattr(self._ort.SessionOptions, _GIVES_WEIGHTS) else None
        self.holds_files = self._folder is not None
        """Whether all that it reads, now and later, is what was hashed, whatever the plan's path holds by then."""
        self._mapped = b"" if self._folder is None else map_file(self._folder, WEIGHTS)
        self._lock = Lock()
        self._closed = False
        self._inputs = {name: {port.name for port in graph.inputs} for name, graph in manifest.graphs.items()}
        self._run_options, self._encoder_options = self._ort.RunOptions(), self._ort.RunOptions()
        for options in (self._run_options, self._encoder_options):
            options.log_severity_level = 4
        # An edit encodes once, before all else: what that took, 120 MB at d16, is given back, or it adds to the peak.
        self._encoder_options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        names = [name for name in _AT_ONCE if name in manifest.graphs]
        # Making a session leaves the interpreter free: together they take as long as the largest.
        with ThreadPoolExecutor(len(names)) as pool:
            self._sessions = dict(zip(names, pool.map(self._open, names), strict=True))

    def step_graph(self, scale: int, batch: int) -> str:
        """Always the graph with named dimensions."""
        return "step"

    def run(self, graph: str, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        """Run `graph` on the arrays as they lie in memory. Sessions are thread-safe; each call binds anew."""
        session = self._session(graph)
        binding = session.io_binding()
        wanted = self._inputs[graph]
        try:
            for name, buffer in inputs.items():
                if name in wanted:
                    array = array_of(buffer)
                    binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
            for name, buffer in outputs.items():
                array = array_of(buffer)
                binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
            options = self._encoder_options if graph == "encoder" else self._run_options
            session.run_with_iobinding(binding, options)
        except Exception as error:
            raise RunError(f"onnxruntime failed in the graph {graph!r}: {one_line(error)}") from error

    def report(self) -> dict[str, Any]:
        """ONNX Runtime's version and the threads that it was given (0: its own choice)."""
        return {"engine": f"onnxruntime {self._ort.__version__}", "threads": self._threads}

    def close(self) -> None:
        """Drop the sessions; what still runs keeps its own until it is done."""
        with self._lock:
            self._closed = True
            self._sessions = {}

    def _session(self, graph: str) -> Any:
        session = self._sessions.get(graph)
        if session is None:
            with self._lock:
                if self._closed:
                    raise RunError("the plan was closed while it was in use; keep it open until all calls return")
                if graph not in self._sessions:
                    self._sessions[graph] = self._open(graph)
                session = self._sessions[graph]
        return session

    def _open(self, graph: str) -> Any:
        file = self._manifest.graphs[graph].file
        options = self._options(graph)
        try:
            session = self._ort.InferenceSession(
                self._source(graph) if self._folder is None else self._checked_source(self._folder, file, options),
                options,
                providers=[CPU_PROVIDER],
                disabled_optimizers=needless_optimizers(self._manifest.precision, graph),
            )
        except Exception as error:
            raise PlanError(
                f"onnxruntime {self._ort.__version__} cannot open {file}: {one_line(error)}; "
                "export the plan again, or upgrade onnxruntime"
            ) from error
        return session

    def _source(self, graph: str) -> str | bytes:
        """What a session is made from: a file, or the graph itself, whose weights are the plan's."""
        return str(self._root / self._manifest.graphs[graph].file)

    def _checked_source(self, folder: PlanFolder, file: str, options: Any) -> bytes:
        """The graph whose file was checked, with `options` that give it its weights: mapped, not copied."""
        data = folder.read(file, GRAPH_BYTES)
        names, values = [], []
        for one in stored_weights(data):
            dtype = _DTYPES[one.kind]
            count = math.prod(one.shape)
            array = np.frombuffer(self._mapped, dtype, count, one.offset) if count else np.empty(0, dtype)
            names.append(one.name)
            values.append(self._ort.OrtValue.ortvalue_from_numpy(array.reshape(one.shape)))
        if names:
            options.add_external_initializers(names, values)
        return data

    def _options(self, graph: str) -> Any:
        options = self._ort.SessionOptions()
        options.log_severity_level = 4  # what matters arrives as an exception, and stderr is the caller's
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        # Several sessions take turns: idle threads of one that spin would slow the next one down.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if self._manifest.precision.weights == "int8" and not _has_amx():
            # CPUs without VNNI add products of u8 and s8 in 16 bits, which is too few; those of u8 and u8 they don't.
            # With VNNI ONNX Runtime leaves it at that by itself, but takes AMX for a CPU without.
            options.add_session_config_entry("session.x64quantprecision", "1")
        if graph.partition(".")[0] == "condition" and self._manifest.precision.weights != "int8":
            # It runs once a class, on a few rows: its matrices, a quarter of a CAR's weights, are read where the file
            # is mapped, not packed into memory of their own first. Int8 ones would be packed in every run.
            options.add_session_config_entry("session.disable_prepacking", "1")
        return options


def _has_amx() -> bool:
    """Whether this CPU multiplies INT8 by AMX; False where the system doesn't say."""
    return "amx_int8" in (cpu_flags() or [])
