"""The backend `cuda`: a plan's graphs by the package's own kernels.

What has no kernels, control encoders made of the tokenizer's, runs in ONNX Runtime in the same memory and on the same
stream; `onnxruntime-gpu` is asked for where a plan has that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any

from car_runtime.backends.base import Buffer, T
from car_runtime.backends.cuda.buffers import CudaBuffers, Memory
from car_runtime.backends.cuda.driver import CudaDevice, Device, opening
from car_runtime.backends.cuda.kernels import check_target
from car_runtime.backends.cuda.launch_plan import problem
from car_runtime.backends.cuda.steps import open_steps
from car_runtime.backends.cuda.tiles import Tiles
from car_runtime.backends.onnxruntime.cuda import OrtCuda
from car_runtime.errors import BackendError, CarError
from car_runtime.format.manifest import Manifest
from car_runtime.system.gpu import probe


class Cuda(CudaBuffers):
    """The backend `cuda`. `device`, `module` (onnxruntime) and `tiles` are given by tests alone."""

    name = "cuda"
    batches: tuple[int, ...] = (1, 2, 3, 4)
    guided_only = False

    def __init__(
        self,
        root: Path,
        manifest: Manifest,
        device: Device | None = None,
        module: Any = None,
        tiles: Tiles | None = None,
    ) -> None:
        reason = problem(manifest)
        if reason is not None:
            raise BackendError(reason)
        check_target((probe() if device is None else device.gpu).target)
        self._root, self._manifest, self._module = root, manifest, module
        self._others: OrtCuda | None = None
        if device is None:
            device = CudaDevice()
            tiles = Tiles(device.gpu)
        self._device = device
        self._free_at_start = self._device.free_memory()
        self._memory = Memory(self._device)
        try:
            self._kernels = open_steps(root, manifest, self._memory, tiles)
            controls = [f"control.{name}" for name in manifest.model.branches]
            if any(graph not in self._kernels.graphs for graph in controls):
                self._rest()
        except BaseException:
            self._close()
            raise

    def step_graph(self, scale: int, batch: int) -> str:
        """Always the graph with named dimensions."""
        return "step"

    def run(self, graph: str, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        """Put a graph on the stream."""
        if graph in self._kernels.graphs:
            self._kernels.run(graph, inputs, outputs)
        else:
            self._rest().run(graph, inputs, outputs)

    def repeated(self, owner: object, key: Hashable, work: Callable[[], T]) -> T:
        """See `Backend`. `work` must need no graph but those with kernels."""
        return self._kernels.repeated(owner, key, work)

    def report(self) -> dict[str, Any]:
        """The engine, the GPU, memory in bytes, what was recorded, and the kernels of the longest graph."""
        gpu = self._device.gpu
        with self._memory.lock:
            facts: dict[str, Any] = {
                "engine": "own kernels",
                "gpu": gpu.name,
                "target": gpu.target,
                "driver": gpu.driver,
                "buffer_bytes": self._memory.used,
                **self._kernels.report(),
            }
            if self._others is not None:
                others = self._others.report()
                facts["engine"] += f", {others['engine']}"
                facts["graphs_captured"] += others["graphs_captured"]
                facts["not_captured"] |= others["not_captured"]
            if not self._memory.closed:
                facts["memory_bytes"] = max(self._free_at_start - self._device.free_memory(), self._memory.used)
        return facts

    def close(self) -> None:
        """Free recordings, sessions and all memory. Closing twice does nothing."""
        with self._memory.lock:
            if self._memory.closed:
                return
            with contextlib.suppress(CarError):
                self._device.synchronize()
            self._kernels.close()
            self._close()

    def _close(self) -> None:
        if self._others is not None:
            self._others.close()
        self._memory.close()
        with contextlib.suppress(CarError):
            self._device.close()

    def _rest(self) -> OrtCuda:
        """What runs graphs that have no kernels. Raises BackendError where ONNX Runtime is not there."""
        with self._memory.lock:
            self._memory.check_open()
            if self._others is None:
                self._others = OrtCuda(self._root, self._manifest, None, self._module, self._memory)
            return self._others


def open_cuda(root: Path, manifest: Manifest, threads: int | None) -> Cuda:
    """Own kernels on the first GPU. Raises BackendError with the remedy where they can't run here."""
    with opening():
        return Cuda(root, manifest)
