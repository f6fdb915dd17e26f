"""A plan's graphs by the package's own kernels: put on the stream, recorded, launched again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from car_runtime.backends.base import Buffer
from car_runtime.backends.cuda.buffers import DeviceArray, Memory, device_array
from car_runtime.backends.cuda.driver import CudaError, Graph
from car_runtime.backends.cuda.kernels import Launch, read_cubins
from car_runtime.backends.cuda.launch_plan import LaunchPlan, problem, sizes_of, strides_of
from car_runtime.backends.cuda.weights import DeviceWeights
from car_runtime.errors import BackendError
from car_runtime.format.manifest import Manifest
from car_runtime.format.parameters import UnsupportedGraphError, plan_parameters

RECORDINGS = 64
"""What comes later is put on the stream kernel by kernel."""
LISTS = 256
"""Lists of launches that are kept to be recorded when they come again."""
_Key = tuple[object, ...]


def open_steps(root: Path, manifest: Manifest, memory: Memory) -> StepKernels:
    """Load kernels and weights. BackendError with the remedy for a plan or a GPU that the kernels are not for."""
    reason = problem(manifest)
    if reason is not None:
        raise BackendError(reason)
    code = read_cubins(memory.device.gpu.target)
    try:
        plan = LaunchPlan(
            sizes_of(manifest, strides_of(manifest, root)), DeviceWeights(plan_parameters(manifest, root), memory)
        )
    except UnsupportedGraphError as error:
        raise BackendError(f"{error}; export the plan again, or use --backend ort-cuda") from error
    memory.device.load_kernels(code)
    return StepKernels(plan, memory)


class StepKernels:
    """Runs some graphs of a plan on the memory and the stream of a backend that runs the others."""

    def __init__(self, plan: LaunchPlan, memory: Memory) -> None:
        """The kernels are loaded already."""
        self._plan, self._memory = plan, memory
        self._scratch: dict[str, DeviceArray] = {}
        self._grown: list[DeviceArray] = []
        self._launches: dict[_Key, list[Launch]] = {}
        self._longest = 0
        self._recorded: dict[_Key, Graph] = {}
        self._plain: dict[str, str] = {}

    @property
    def graphs(self) -> tuple[str, ...]:
        """The graphs that `run` knows."""
        return self._plan.graphs

    def run(self, graph: str, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        """Put a graph on the stream. The second time on the same buffers it is recorded, later it is one launch."""
        taken = {name: device_array(buffer) for name, buffer in inputs.items()}
        given = {name: device_array(buffer) for name, buffer in outputs.items()}
        ports = [(name, array.address, array.shape) for one in (taken, given) for name, array in sorted(one.items())]
        key: _Key = (graph, *ports)
        device = self._memory.device
        with self._memory.lock:
            self._memory.check_open()
            if key in self._recorded:
                device.launch(self._recorded[key])
                return
            seen = key in self._launches
            if not seen:
                if len(self._launches) >= LISTS:
                    self._launches.clear()
                self._launches[key] = self._plan.launches(graph, taken, given, self._room(graph, taken))
                self._longest = max(self._longest, len(self._launches[key]))
            recorded = self._record(graph, self._launches[key]) if seen and self._records(graph) else None
            if recorded is None:
                self._put(self._launches[key])
            else:
                self._recorded[key] = recorded
                del self._launches[key]
                device.launch(recorded)

    def _records(self, graph: str) -> bool:
        return graph not in self._plain and len(self._recorded) < RECORDINGS

    def _record(self, graph: str, launches: Sequence[Launch]) -> Graph | None:
        """The launches as one; None where they cannot be recorded, and are put one by one from then on."""
        device = self._memory.device
        device.begin_capture()
        try:
            try:
                self._put(launches)
            finally:
                recorded = device.end_capture()
        except CudaError as error:
            self._plain[graph] = str(error)
            return None
        return recorded

    def _put(self, launches: Sequence[Launch]) -> None:
        for launch in launches:
            self._memory.device.put_kernel(launch.kernel, launch.grid, launch.arguments)

    def report(self) -> dict[str, Any]:
        """What was recorded and what could not be, and how many kernels the longest graph launches."""
        return {
            "graphs_captured": len(self._recorded),
            "not_captured": dict(self._plain),
            "launches": self._longest,
        }

    def close(self) -> None:
        """Let go of what was recorded; the memory is the backend's."""
        with suppress(CudaError):  # after a fault of the device every call fails
            for graph in self._recorded.values():
                self._memory.device.free_graph(graph)
        self._recorded.clear()
        self._launches.clear()

    def _room(self, graph: str, inputs: Mapping[str, DeviceArray]) -> dict[str, int]:
        """Addresses for what a graph keeps to itself. What was too small stays, since recordings are on it."""
        for name, size in self._plan.scratch(graph, inputs).items():
            there = self._scratch.get(name)
            if size and (there is None or there.nbytes < size):
                self._grown += [there] if there is not None else []
                self._scratch[name] = self._memory.allocate((size,), "uint8")
        return {name: array.address for name, array in self._scratch.items()}
