"""ONNX Runtime on an NVIDIA GPU: the plan's own graphs, with all buffers in the GPU's memory.

The step uses the graph with named dimensions, so that its weights are on the GPU once. ONNX Runtime records a run as
a CUDA graph where every node of the graph runs on the GPU, one per number that it is given: one number stands for one
graph on one set of addresses and shapes, since a recording is launched without looking at what is bound.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from car_runtime.backends.base import Buffer
from car_runtime.backends.cuda.buffers import CudaBuffers, DeviceArray, Memory, device_array
from car_runtime.backends.cuda.driver import CudaDevice, Device, opening
from car_runtime.backends.onnxruntime.session import import_onnxruntime
from car_runtime.backends.onnxruntime.spec import CPU_PROVIDER, CUDA_LIBRARIES, CUDA_PROVIDER, ORT_CUDA
from car_runtime.errors import BackendError, CarError, RunError, one_line
from car_runtime.format.manifest import Manifest
from car_runtime.system.gpu import probe

GRAPHS = 64
"""Recordings of one session; ONNX Runtime keeps them until the session ends. What comes later runs unrecorded."""

_AT_ONCE = ("step", "condition", "control", "decoder")
_TENSOR_CORES = {"use_tf32": "1", "cudnn_conv_algo_search": "HEURISTIC"}
_HALF = {"control": {**_TENSOR_CORES, "prefer_nhwc": "1"}, "decoder": _TENSOR_CORES}
"""Options of graphs that have no product in float32 where the plan is in half precision.

With `use_tf32` = 0 ONNX Runtime keeps all convolutions from the tensor cores, those in half precision too. cuDNN's
quick search finds kernels as fast as the default one does, seconds sooner. Channels last is no faster in the decoder,
part of which the CPU would get then, and a graph with a node on the CPU cannot be recorded.
"""
_BFLOAT16 = 16  # ONNX's number of the type, which numpy has no name for


class OrtCuda(CudaBuffers):
    """The backend `ort-cuda`, and what runs single graphs for `cuda`, in its memory and on its stream.

    `device` and `module` are given by tests alone.
    """

    name = "ort-cuda"
    batches: tuple[int, ...] = (1, 2, 3, 4)
    guided_only = False

    def __init__(
        self,
        root: Path,
        manifest: Manifest,
        device: Device | None = None,
        module: Any = None,
        memory: Memory | None = None,
    ) -> None:
        """memory: another backend's, which closes it; sessions then open when their graphs are first run."""
        if manifest.precision.weights == "int8":
            raise BackendError(
                "the plan is an int8 one, whose products are for CPUs; use --backend ort-cpu or openvino, or export "
                "it with --precision fp16"
            )
        if device is None and memory is None:
            probe()
        self._ort = module if module is not None else _load_onnxruntime()
        if CUDA_PROVIDER not in self._ort.get_available_providers():
            raise BackendError(
                f"the onnxruntime {self._ort.__version__} that is installed has no CUDA; "
                f"run: {', then '.join(ORT_CUDA.install)}"
            )
        self._root, self._manifest = root, manifest
        self._shares = memory is not None
        self._memory = memory if memory is not None else Memory(device if device is not None else CudaDevice())
        self._device = self._memory.device
        self._free_at_start = self._device.free_memory()
        self._sessions: dict[str, _Session] = {}
        self._plain: dict[str, str] = {}
        self._refused: dict[str, str] = {}
        try:
            for graph in _AT_ONCE:
                if graph in manifest.graphs and not self._shares:
                    self._open(graph)
        except BaseException:
            self.close()
            raise

    def step_graph(self, scale: int, batch: int) -> str:
        """Always the graph with named dimensions."""
        return "step"

    def run(self, graph: str, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        """Put a graph on the stream."""
        with self._memory.lock:
            self._memory.check_open()
            session = self._sessions[graph] if graph in self._sessions else self._open(graph)
            given = {name: device_array(buffer) for name, buffer in inputs.items() if name in session.inputs}
            asked = {name: device_array(buffer) for name, buffer in outputs.items()}
            binding = session.bind(given, asked)
            number = session.number(given, asked)
            if number is not None:
                try:
                    session.run(binding, number)
                    return
                except Exception as error:
                    # What cannot be recorded is run as it is; what is wrong with it beyond that shows then.
                    session.graphs = False
                    self._plain[graph] = one_line(error)
            try:
                session.run(binding, -1)
            except Exception as error:
                if self._options(graph) and not session.ran:
                    self._refused[graph] = one_line(error)
                    self._plain.pop(graph, None)
                    self._open(graph)
                    self.run(graph, inputs, outputs)
                    return
                raise RunError(
                    f"onnxruntime failed in the graph {graph!r} on the GPU: {one_line(error)}; "
                    "close the plan and open it again, or use --backend ort-cpu"
                ) from error

    def report(self) -> dict[str, Any]:
        """The engine, the GPU, memory in bytes, and what was recorded."""
        gpu = self._device.gpu
        with self._memory.lock:
            facts: dict[str, Any] = {
                "engine": f"onnxruntime {self._ort.__version__}",
                "gpu": gpu.name,
                "target": gpu.target,
                "driver": gpu.driver,
                "buffer_bytes": self._memory.used,
                "graphs_captured": sum(len(session.numbers) for session in self._sessions.values()),
                "not_captured": dict(self._plain),
                "options_refused": dict(self._refused),
            }
            if not self._memory.closed:
                facts["memory_bytes"] = max(self._free_at_start - self._device.free_memory(), self._memory.used)
        return facts

    def close(self) -> None:
        """Free the sessions and all memory. Closing twice does nothing."""
        with self._memory.lock:
            if self._memory.closed:
                return
            with contextlib.suppress(CarError):
                self._device.synchronize()
            self._sessions.clear()
            if self._shares:
                return
            self._memory.close()
            with contextlib.suppress(CarError):
                self._device.close()

    def _open(self, graph: str) -> _Session:
        """A session that records, with the graph's options, or else without them, or else one that doesn't record."""
        if self._options(graph):
            try:
                session = self._make_session(graph, record=True)
                if session.get_providers()[0] == CUDA_PROVIDER:
                    return self._keep(graph, session)
                self._refused[graph] = f"onnxruntime {self._ort.__version__} would leave the GPU"
            except Exception as error:
                self._refused[graph] = one_line(error)
        try:
            session = self._make_session(graph, record=True)
        except Exception as error:
            self._plain[graph] = one_line(error)
            try:
                session = self._make_session(graph, record=False)
            except Exception as error:
                file = self._manifest.graphs[graph].file
                raise BackendError(
                    f"onnxruntime {self._ort.__version__} cannot open {file} on the GPU: {one_line(error)}; "
                    "upgrade onnxruntime-gpu, or use --backend ort-cpu"
                ) from error
        found = session.get_providers()[0]
        if found != CUDA_PROVIDER:
            raise BackendError(
                f"onnxruntime {self._ort.__version__} cannot load its CUDA libraries and would run on {found}; "
                f"install CUDA and cuDNN for it: {CUDA_LIBRARIES}"
            )
        return self._keep(graph, session)

    def _keep(self, graph: str, session: Any) -> _Session:
        inputs = {port.name for port in self._manifest.graphs[graph].inputs}
        self._sessions[graph] = _Session(self._ort, session, inputs, graph not in self._plain)
        return self._sessions[graph]

    def _options(self, graph: str) -> dict[str, str]:
        """What this graph gets beyond the options of all, unless it was refused."""
        if self._manifest.precision.compute == "fp32" or graph in self._refused:
            return {}
        return _HALF.get(graph.partition(".")[0], {})

    def _make_session(self, graph: str, record: bool) -> Any:
        own = self._options(graph)
        options = self._ort.SessionOptions()
        options.log_severity_level = 4  # what matters arrives as an exception, and stderr is the caller's
        provider = {
            "device_id": "0",
            "has_user_compute_stream": "1",
            "user_compute_stream": str(self._device.stream),
            "enable_cuda_graph": str(int(record)),
            "arena_extend_strategy": "kSameAsRequested",
            "use_tf32": "0",  # float32 means float32: the tokens are to be the CPU's
            **own,
        }
        path = str(self._root / self._manifest.graphs[graph].file)
        providers = [(CUDA_PROVIDER, provider), CPU_PROVIDER]
        if own:  # what is wrong with them is to be raised, not printed before it goes on without a GPU
            return self._ort.InferenceSession(path, options, providers=providers, enable_fallback=0)
        return self._ort.InferenceSession(path, options, providers=providers)


class _Session:
    """A session, and the numbers of what it recorded: what ran on the same buffers before."""

    def __init__(self, ort: Any, session: Any, inputs: set[str], graphs: bool) -> None:
        self._ort = ort
        self._session = session
        self.inputs = inputs
        self.graphs = graphs
        self.ran = False
        self.numbers: dict[tuple[object, ...], int] = {}
        self._seen: set[tuple[object, ...]] = set()

    def bind(self, inputs: Mapping[str, DeviceArray], outputs: Mapping[str, DeviceArray]) -> Any:
        """The buffers as they lie in the GPU's memory."""
        binding = self._session.io_binding()
        for name, array in inputs.items():
            binding.bind_input(name, "cuda", 0, _element(array.dtype), array.shape, array.address)
        for name, array in outputs.items():
            binding.bind_output(name, "cuda", 0, _element(array.dtype), array.shape, array.address)
        return binding

    def number(self, inputs: Mapping[str, DeviceArray], outputs: Mapping[str, DeviceArray]) -> int | None:
        """The recording on these buffers, from 1; None the first time, and where there can't be one."""
        if not self.graphs:
            return None
        ports = (*inputs.items(), *outputs.items())
        key = tuple((name, array.address, array.shape) for name, array in ports)
        if key not in self._seen:
            self._seen.add(key)
        elif key not in self.numbers and len(self.numbers) < GRAPHS:
            self.numbers[key] = len(self.numbers) + 1
        return self.numbers.get(key)

    def run(self, binding: Any, number: int) -> None:
        """Put a run on the stream; a number records it first, or launches what it recorded, −1 does neither."""
        options = self._ort.RunOptions()
        options.log_severity_level = 4
        options.add_run_config_entry("gpu_graph_id", str(number))
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self._session.run_with_iobinding(binding, options)
        self.ran = True


def open_ort_cuda(root: Path, manifest: Manifest, threads: int | None) -> OrtCuda:
    """ONNX Runtime with CUDA on the first GPU. Raises BackendError with the remedy where it can't run here."""
    with opening():
        return OrtCuda(root, manifest)


def _element(dtype: str) -> Any:
    return _BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype).type


def _load_onnxruntime() -> Any:
    onnxruntime = import_onnxruntime(ORT_CUDA, "onnxruntime-gpu", ("gpu",))
    # It logs plugins and kernels that it tried; what matters is raised.
    onnxruntime.set_default_logger_severity(4)
    preload = getattr(onnxruntime, "preload_dlls", None)
    if preload is not None and CUDA_PROVIDER in onnxruntime.get_available_providers():
        with contextlib.redirect_stdout(None):  # it prints what it doesn't find
            preload()
    return onnxruntime
