"""The backend `cuda`: steps by the package's own kernels, other graphs by ONNX Runtime on the same stream."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from car_runtime.backends.base import Buffer
from car_runtime.backends.cuda.driver import Device, opening
from car_runtime.backends.cuda.kernels import check_target
from car_runtime.backends.cuda.launch_plan import problem
from car_runtime.backends.cuda.steps import open_steps
from car_runtime.backends.onnxruntime.cuda import OrtCuda
from car_runtime.errors import BackendError
from car_runtime.format.manifest import Manifest
from car_runtime.system.gpu import probe


class Cuda(OrtCuda):
    """The backend `cuda`. `device` and `module` are given by tests alone."""

    name = "cuda"
    at_once = ("condition", "decoder")

    def __init__(self, root: Path, manifest: Manifest, device: Device | None = None, module: Any = None) -> None:
        reason = problem(manifest)
        if reason is not None:
            raise BackendError(reason)
        check_target((probe() if device is None else device.gpu).target)  # sessions take seconds to open
        super().__init__(root, manifest, device, module)
        try:
            self._kernels = open_steps(root, manifest, self._memory)
        except BaseException:
            super().close()
            raise

    def run(self, graph: str, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        """Put a graph on the stream."""
        if graph in self._kernels.graphs:
            self._kernels.run(graph, inputs, outputs)
        else:
            super().run(graph, inputs, outputs)

    def report(self) -> dict[str, Any]:
        """What `ort-cuda` reports, and the kernels that the longest graph launches."""
        facts, kernels = super().report(), self._kernels.report()
        return {
            **facts,
            "graphs_captured": facts["graphs_captured"] + kernels["graphs_captured"],
            "not_captured": facts["not_captured"] | kernels["not_captured"],
            "launches": kernels["launches"],
        }

    def close(self) -> None:
        """Free recordings, sessions and all memory. Closing twice does nothing."""
        with self._memory.lock:
            if not self._memory.closed:
                self._kernels.close()
            super().close()


def open_cuda(root: Path, manifest: Manifest, threads: int | None) -> Cuda:
    """Own kernels on the first GPU. Raises BackendError with the remedy where they can't run here."""
    with opening():
        return Cuda(root, manifest)
