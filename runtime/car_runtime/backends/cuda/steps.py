"""A plan's graphs by the package's own kernels: put on the stream, recorded, put there again.

What is recorded is a graph of the plan on its buffers or, where nobody looks in between, a whole image.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from car_runtime.backends.base import Buffer, T
from car_runtime.backends.cuda.buffers import DeviceArray, Memory, Recording, device_array
from car_runtime.backends.cuda.driver import CudaError
from car_runtime.backends.cuda.kernels import Launch, read_cubins
from car_runtime.backends.cuda.launch_plan import LaunchPlan, problem, scale_constants, sizes_of, strides_of
from car_runtime.backends.cuda.tiles import Tiles
from car_runtime.backends.cuda.weights import DeviceWeights
from car_runtime.errors import BackendError
from car_runtime.format.manifest import Manifest
from car_runtime.format.parameters import UnsupportedGraphError, plan_parameters

RECORDINGS = 64
"""What comes later is put on the stream kernel by kernel."""
LISTS = 256
"""Lists of launches that are kept to be recorded when they come again."""
IMAGES = 4
"""Recordings of whole images that one set of buffers keeps: with guidance, without, of other branches."""
_WHOLE = "images"
_Key = tuple[object, ...]


def open_steps(root: Path, manifest: Manifest, memory: Memory, tiles: Tiles | None = None) -> StepKernels:
    """Load kernels and weights. BackendError with the remedy for a plan or a GPU that the kernels are not for.

    tiles: those of this GPU; None: as the launch plan's rule has them.
    """
    reason = problem(manifest)
    if reason is not None:
        raise BackendError(reason)
    code = read_cubins(memory.device.gpu.target)
    try:
        sizes = sizes_of(manifest, strides_of(manifest, root))
        weights = DeviceWeights(plan_parameters(manifest, root), memory, sizes.half)
        plan = LaunchPlan(sizes, weights, scale_constants(manifest, root) if "encoder" in manifest.graphs else ())
    except UnsupportedGraphError as error:
        raise BackendError(f"{error}; export the plan again, or use --backend ort-cuda") from error
    memory.device.load_kernels(code)
    return StepKernels(plan, memory, tiles)


@dataclass(frozen=True)
class _Whole:
    """A recorded piece of work, and what it returned."""

    recording: Recording
    result: Any


class StepKernels:
    """Runs some graphs of a plan on the memory and the stream of a backend that runs the others."""

    def __init__(self, plan: LaunchPlan, memory: Memory, tiles: Tiles | None = None) -> None:
        """The kernels are loaded already."""
        self._plan, self._memory, self._tiles = plan, memory, tiles
        self._scratch: dict[str, DeviceArray] = {}
        self._grown: list[DeviceArray] = []
        self._launches: dict[_Key, list[Launch]] = {}
        self._longest = 0
        self._recorded: dict[_Key, Recording] = {}
        self._plain: dict[str, str] = {}
        self._whole: dict[int, dict[Hashable, _Whole | None]] = {}
        # Finalisers run at any time, in any thread: they only note what to let go.
        self._returned: deque[Recording] = deque()

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
        memory = self._memory
        with memory.lock:
            memory.check_open()
            if key in self._recorded and not memory.recording:
                memory.replay(self._recorded[key])
                return
            seen = key in self._launches
            if not seen:
                if len(self._launches) >= LISTS:
                    self._launches.clear()
                self._launches[key] = self._tiled(self._plan.launches(graph, taken, given, self._room(graph, taken)))
                self._longest = max(self._longest, len(self._launches[key]))
            launches = self._launches[key]
            records = seen and not memory.recording and len(self._recorded) < RECORDINGS
            made = self._record(graph, lambda: self._put(launches)) if records else None
            if made is None:
                self._put(launches)
            else:
                self._recorded[key] = made[1]
                del self._launches[key]
                memory.replay(made[1])

    def _tiled(self, launches: list[Launch]) -> list[Launch]:
        """With this GPU's tiles. To time them the launches are done, and once more: a graph writes over no input."""
        if self._tiles is None:
            return launches
        if self._tiles.lack(launches) and not self._memory.recording:
            self._put(launches)
            self._tiles.measure(self._memory, launches)
        return self._tiles.chosen(launches)

    def repeated(self, owner: object, key: Hashable, work: Callable[[], T]) -> T:
        """See `Backend`. What comes the second time is recorded, and put on the stream as one from then on."""
        with self._memory.lock:
            self._memory.check_open()
            self._let_go()
            if id(owner) not in self._whole:
                self._whole[id(owner)] = {}
                weakref.finalize(owner, self._forget, id(owner)).atexit = False
            pieces = self._whole[id(owner)]
            piece = pieces.get(key)
            if piece is None and key in pieces:
                made = self._record(_WHOLE, work)
                piece = pieces[key] = None if made is None else _Whole(made[1], made[0])
            elif len(pieces) < IMAGES:
                pieces.setdefault(key, None)
            if piece is not None:
                self._memory.replay(piece.recording)
                result: T = piece.result
                return result
        return work()

    def _record(self, what: str, work: Callable[[], T]) -> tuple[T, Recording] | None:
        """None where it cannot be recorded: then its launches are put one by one from then on."""
        if what in self._plain:
            return None
        try:
            return self._memory.record(work)
        except CudaError as error:
            self._plain[what] = str(error)
            return None

    def _forget(self, owner: int) -> None:
        self._returned += [piece.recording for piece in self._whole.pop(owner, {}).values() if piece is not None]

    def _let_go(self) -> None:
        while self._returned:
            self._memory.device.free_graph(self._returned.popleft().graph)

    def _put(self, launches: Sequence[Launch]) -> None:
        for launch in launches:
            self._memory.device.put_kernel(launch.kernel, launch.grid, launch.arguments)

    def report(self) -> dict[str, Any]:
        """What was recorded and what could not be, and how many kernels the longest graph launches."""
        return {
            "graphs_captured": len(self._recorded) + len(self._wholes()),
            "not_captured": dict(self._plain),
            "launches": self._longest,
        }

    def close(self) -> None:
        """Let go of what was recorded; the memory is the backend's."""
        with suppress(CudaError):  # after a fault of the device every call fails
            self._let_go()
            for recording in (*self._recorded.values(), *(piece.recording for piece in self._wholes())):
                self._memory.device.free_graph(recording.graph)
        self._recorded.clear()
        self._whole.clear()
        self._launches.clear()

    def _wholes(self) -> list[_Whole]:
        return [piece for pieces in list(self._whole.values()) for piece in pieces.values() if piece is not None]

    def _room(self, graph: str, inputs: Mapping[str, DeviceArray]) -> dict[str, int]:
        """Addresses for what a graph keeps to itself. What was too small stays, since recordings are on it."""
        for name, size in self._plan.scratch(graph, inputs).items():
            there = self._scratch.get(name)
            if size and (there is None or there.nbytes < size):
                self._grown += [there] if there is not None else []
                self._scratch[name] = self._memory.allocate((size,), "uint8")
        return {name: array.address for name, array in self._scratch.items()}
