"""A fake GPU, a fake TensorRT and a fake ONNX Runtime with CUDA, to run the GPU backends on a machine without one.

Nothing here is real but the arithmetic: a fake engine computes a profile by running the plan's ONNX graph in ONNX
Runtime on the CPU, on the bytes that lie at the bound addresses. The device works behind the caller's back, as a GPU
does, only as late as it may: not before somebody waits for it. So a host block that is reused too early, a result
that is read too early, and a buffer that is given back too early all show as wrong pictures or as a DeviceFault.

Every access is checked: outside an allocation, after it was freed, before anything was written; outputs that overlap
anything else of the same run; addresses that are not aligned; a port without an address; a wrong shape for the
profile; a recording that is launched after its memory was freed; memory that is asked for while recording.
"""

from __future__ import annotations

import bisect
import enum
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from threading import RLock
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime

from car_runtime.backends.cuda import CudaError, Gpu
from car_runtime.manifest import Engine, Manifest, describe_files, read_manifest, write_manifest

GPU = Gpu(name="Fake RTX 4090", capability=(8, 9), memory_bytes=1 << 30, count=1, driver="13.0", runtime="13.0")
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "bool": 1, "uint8": 1}
RUBBISH = 0xA5


class DeviceFault(BaseException):
    """Something that a GPU would answer with a crash, or a wrong result. Nobody's `except Exception` hides it."""


@dataclass(eq=False)
class Block:
    """An allocation: its bytes, and which of them were ever written."""

    address: int
    content: np.ndarray
    written: np.ndarray
    freed: bool = False


@dataclass(eq=False)
class Work:
    """Something on the stream: what it reads and writes (address, size), and what it does."""

    kind: str
    reads: list[tuple[int, int]]
    writes: list[tuple[int, int]]
    do: Callable[[], None]
    detail: Any = None


@dataclass(eq=False)
class FakeEvent:
    """A point on the stream."""

    records: int = 0
    """The latest one counts, as on a GPU."""
    time: float | None = None
    freed: bool = False


@dataclass(eq=False)
class FakeGraph:
    """Recorded work."""

    works: list[Work]
    launches: int = 0
    freed: bool = False


@dataclass(eq=False)
class Enqueued:
    """A run of a profile, as it was bound."""

    profile: str
    addresses: dict[str, int]
    shapes: dict[str, tuple[int, ...]]
    values: dict[str, np.ndarray] = field(default_factory=dict)
    """The inputs as they were when the device got there the last time."""
    count: int = 0
    """How often it was computed."""


class FakeDevice:
    """The Device of car_runtime.backends.cuda, in numpy."""

    def __init__(self, gpu: Gpu = GPU, memory: int = 1 << 30) -> None:
        self.gpu = gpu
        self.stream = 0x5EA
        self.memory = memory
        self.blocks: dict[int, Block] = {}
        self._starts: list[int] = []
        self._next = 0x7_0000_0000
        self.hosts: list[np.ndarray] = []
        self.pending: list[Work] = []
        self.recording: list[Work] | None = None
        self.graphs: list[FakeGraph] = []
        self.events: list[FakeEvent] = []
        self.clock = 0.0
        self.moved: Counter[str] = Counter()
        """Bytes by direction: to_device, to_host, on_device."""
        self.log: list[tuple[str, Any]] = []
        self.runs: list[Enqueued] = []
        """Runs that were put on the stream one by one, not by a launch."""
        self.refuse_capture = False
        self.closed = False
        self._working = RLock()  # any thread may wait, and who waits does the work

    # What the backends call.

    def malloc(self, size: int) -> int:
        self._not_recording("malloc")
        if self.allocated() + size > self.memory:
            raise CudaError("CUDA failed in cudaMalloc: out of memory (fake); close other programs", 2)
        address = self._next
        self._next += -(-size // 4096) * 4096 + 65536  # never the same address twice, never side by side
        self.blocks[address] = Block(address, np.full(size, RUBBISH, np.uint8), np.zeros(size, bool))
        self._starts.append(address)
        self.log.append(("malloc", size))
        return address

    def free(self, address: int) -> None:
        self._not_recording("free")
        block = self.blocks.get(address)
        if block is None or block.freed:
            raise DeviceFault(f"free of {address:#x}, which is not allocated")
        for work in self.pending:
            if any(self._inside(block, at) for at, size in (*work.reads, *work.writes) if size):
                raise DeviceFault(f"free of {address:#x} while {work.kind} on it is pending")
        block.freed = True
        self.log.append(("free", len(block.content)))

    def malloc_host(self, size: int) -> np.ndarray:
        self._not_recording("malloc_host")
        block = np.full(size, RUBBISH, np.uint8)
        self.hosts.append(block)
        return block

    def free_host(self, block: np.ndarray) -> None:
        for work in self.pending:
            if work.detail is block:
                raise DeviceFault("a host block is freed while a copy with it is pending")
        self.hosts = [other for other in self.hosts if other is not block]

    def to_device(self, target: int, block: np.ndarray, size: int) -> None:
        self._host(block, size)
        self.moved["to_device"] += size
        self._put(Work("to_device", [], [(target, size)], lambda: self.store(target, block[:size]), block))

    def to_host(self, block: np.ndarray, source: int, size: int) -> None:
        self._host(block, size)
        self.moved["to_host"] += size

        def do() -> None:
            block[:size] = self.load(source, size)

        self._put(Work("to_host", [(source, size)], [], do, block))

    def on_device(self, target: int, source: int, size: int) -> None:
        self.moved["on_device"] += size
        copy = Work(
            "on_device", [(source, size)], [(target, size)], lambda: self.store(target, self.load(source, size))
        )
        self._put(copy)

    def on_device_spaced(self, target: int, source: int, size: int, spacing: int, count: int) -> None:
        if not 0 < size <= spacing or count < 1:
            raise DeviceFault(f"{count} pieces of {size} bytes, every {spacing}: CUDA refuses such a copy")
        pieces = [(source + i * spacing, size) for i in range(count)]
        if source < target + count * size and target < source + count * spacing:
            raise DeviceFault("source and target of a copy with gaps overlap")
        self.moved["on_device"] += count * size
        self.log.append(("spaced copy", (size, spacing, count)))

        def do() -> None:
            self.store(target, np.concatenate([self.load(*piece) for piece in pieces]))

        self._put(Work("on_device_spaced", pieces, [(target, count * size)], do))

    def event(self) -> FakeEvent:
        self.events.append(FakeEvent())
        return self.events[-1]

    def record(self, event: FakeEvent) -> None:
        self._not_recording("record")
        if event.freed:
            raise DeviceFault("a freed event is recorded")
        event.records += 1
        event.time, number = None, event.records

        def do() -> None:
            if number == event.records:
                event.time = self.clock

        self._put(Work("event", [], [], do, event))

    def done(self, event: FakeEvent) -> bool:
        self._not_recording("done")
        return event.time is not None

    def wait(self, event: FakeEvent) -> None:
        if event.freed or not event.records:
            raise DeviceFault("wait for an event that was freed or never recorded")
        while event.time is None:
            with self._working:
                if event.time is None:
                    self._work_once()

    def elapsed(self, begin: FakeEvent, end: FakeEvent) -> float:
        if begin.time is None or end.time is None:
            raise DeviceFault("elapsed time of an event that is not done")
        return end.time - begin.time

    def free_event(self, event: FakeEvent) -> None:
        if event.freed:
            raise DeviceFault("an event is freed twice")
        event.freed = True

    def synchronize(self) -> None:
        self._not_recording("synchronize")
        with self._working:
            while self.pending:
                self._work_once()

    def begin_capture(self) -> None:
        self._not_recording("begin_capture")
        self.recording = []

    def end_capture(self) -> FakeGraph:
        if self.recording is None:
            raise DeviceFault("end_capture without begin_capture")
        graph, self.recording = FakeGraph(self.recording), None
        if self.refuse_capture:
            raise CudaError("CUDA failed in cudaStreamEndCapture: operation not permitted; try again", 900)
        self.graphs.append(graph)
        self.log.append(("captured", [work.detail for work in graph.works if work.kind == "run"]))
        return graph

    def launch(self, graph: FakeGraph) -> None:
        self._not_recording("launch")
        if graph.freed:
            raise DeviceFault("launch of a freed graph")
        for work in graph.works:
            for address, size in (*work.reads, *work.writes):
                self.block(address, size)
        graph.launches += 1
        self.log.append(("launched", [work.detail for work in graph.works if work.kind == "run"]))
        self.pending += graph.works

    def free_graph(self, graph: FakeGraph) -> None:
        if graph.freed:
            raise DeviceFault("a graph is freed twice")
        graph.freed = True

    def free_memory(self) -> int:
        return self.memory - self.allocated()

    def close(self) -> None:
        if self.pending:
            raise DeviceFault("the stream is closed with work on it")
        self.closed = True

    # What the fakes and the tests call.

    def allocated(self) -> int:
        """Bytes in use."""
        return sum(len(block.content) for block in self.blocks.values() if not block.freed)

    def block(self, address: int, size: int) -> Block:
        """The allocation that holds these bytes."""
        i = bisect.bisect_right(self._starts, address) - 1
        block = self.blocks[self._starts[i]] if i >= 0 else None
        if block is None or address + size > block.address + len(block.content):
            raise DeviceFault(f"access to {size} bytes at {address:#x}, outside of all allocations")
        if block.freed:
            raise DeviceFault(f"access to {size} bytes at {address:#x} after they were freed")
        return block

    def load(self, address: int, size: int) -> np.ndarray:
        """A copy of bytes, which must have been written."""
        if not size:
            return np.empty(0, np.uint8)
        block = self.block(address, size)
        at = slice(address - block.address, address - block.address + size)
        if not block.written[at].all():
            raise DeviceFault(f"{size} bytes at {address:#x} are read before all of them were written")
        return block.content[at].copy()

    def store(self, address: int, content: np.ndarray) -> None:
        """Write bytes."""
        if len(content):
            block = self.block(address, len(content))
            at = slice(address - block.address, address - block.address + len(content))
            block.content[at] = content
            block.written[at] = True

    def put_run(self, run: Enqueued, reads: Mapping[str, Any], writes: Mapping[str, Any], do: Any) -> None:
        """Put a run on the stream; `reads` and `writes`: port → (address, size)."""
        self._apart(run.profile, reads, writes)
        if self.recording is None:
            self.runs.append(run)
            self.log.append(("run", run))
        self._put(Work("run", list(reads.values()), list(writes.values()), do, run))

    def _put(self, work: Work) -> None:
        for address, size in (*work.reads, *work.writes):
            if size:
                self.block(address, size)
        (self.pending if self.recording is None else self.recording).append(work)

    def _work_once(self) -> None:
        if not self.pending:
            raise DeviceFault("waiting for what was never put on the stream: this would hang")
        work = self.pending.pop(0)
        work.do()
        self.clock += 0.001

    def _apart(self, what: str, reads: Mapping[str, Any], writes: Mapping[str, Any]) -> None:
        """No output may share a byte with anything else."""
        spans = sorted((at, at + size, name) for name, (at, size) in (reads | writes).items() if size)
        furthest: tuple[int, str] = (0, "")
        for start, stop, name in spans:
            if start < furthest[0] and (name in writes or furthest[1] in writes):
                raise DeviceFault(f"{what}: {name} and {furthest[1]} overlap, and one of them is written")
            furthest = max(furthest, (stop, name))

    def _inside(self, block: Block, address: int) -> bool:
        return block.address <= address < block.address + len(block.content)

    def _host(self, block: np.ndarray, size: int) -> None:
        if not any(block is host for host in self.hosts) or size > len(block):
            raise DeviceFault("a copy from or to memory that is not page-locked, or too small")

    def _not_recording(self, what: str) -> None:
        if self.recording is not None:
            raise DeviceFault(f"{what} while a graph is recorded")


# Engines.


def write_engines(
    root: Path,
    *,
    flavour: str = "rtx",
    target: str = "sm89",
    version: str = "1.2.3",
    batches: Sequence[int] = (1, 2),
    graphs: Sequence[str] = ("control", "condition", "decoder", "encoder", "step"),
    change: Callable[[dict[str, Any]], None] = lambda sidecar: None,
) -> None:
    """Give a plan engines for the fakes: files of no meaning, and sidecars as the builder writes them.

    As in the engine form of the step, `key_bias` is an input, and the first scale has a past of one token. `change`
    may spoil the sidecars.
    """
    manifest = read_manifest(root)
    (root / "engines").mkdir(exist_ok=True)
    engines = list(manifest.engines)
    files = dict(manifest.files)
    for graph in (name for name in graphs if name in manifest.graphs):
        key = hashlib.sha256(f"{graph} {flavour} {target} {version}".encode()).hexdigest()
        stem = f"engines/{graph}.{flavour}.{target}.{key[:16]}"
        (root / f"{stem}.engine").write_bytes(f"the {flavour} engine of {graph} for {target}, {version}".encode())
        sidecar = {
            "format": 1,
            "graph": graph,
            "flavour": flavour,
            "version": version,
            "target": target,
            "precision": "fp32",
            "key": key,
            "file": f"{stem}.engine",
            "bytes": 1,
            **_ports_and_profiles(manifest, graph, batches),
            "weight_bytes": 1000,
            "build_seconds": 0.5,
            "builder": {},
        }
        change(sidecar)
        (root / f"{stem}.json").write_text(json.dumps(sidecar))
        details = {"graph": graph, "sidecar": f"{stem}.json", "precision": "fp32"}
        engines.append(Engine(file=f"{stem}.engine", flavour=flavour, target=target, key=key, details=details))
        files |= describe_files(root, [f"{stem}.engine", f"{stem}.json"])
    write_manifest(root, replace(manifest, engines=tuple(engines), files=files))


def _ports_and_profiles(manifest: Manifest, graph: str, batches: Sequence[int]) -> dict[str, Any]:
    inputs = [asdict(port) for port in manifest.graphs[graph].inputs]
    outputs = [asdict(port) for port in manifest.graphs[graph].outputs]
    if graph == "control":
        sizes: dict[str, dict[str, int]] = {"control": {}}
    elif graph == "step":
        inputs.append({"name": "key_bias", "dtype": "float32", "shape": ["N"]})
        if not any(port["name"] == "logits" for port in outputs):
            shape = ["B", "S", "S", manifest.model.vocab]
            outputs.append({"name": "logits", "dtype": "float32", "shape": shape})
        sizes = {
            f"step.{k:02}.b{b}": {
                "B": b,
                "R": 2 * b,
                "S": scale.side,
                "T": scale.next_side,
                "P": max(scale.start, 1),
                "N": max(scale.start, 1) + scale.tokens,
                "S*S": scale.tokens,
            }
            for b in batches
            for k, scale in enumerate(manifest.scales)
        }
    else:
        sizes = {f"{graph}.b{b}": {"B": b, "R": 2 * b} for b in (batches if graph != "encoder" else (1,))}
    profiles = [
        {
            "name": name,
            "inputs": {port["name"]: [size.get(dim, dim) for dim in port["shape"]] for port in inputs},
            "outputs": {port["name"]: [size.get(dim, dim) for dim in port["shape"]] for port in outputs},
            "activation_bytes": None,
        }
        for name, size in sizes.items()
    ]
    return {"inputs": inputs, "outputs": outputs, "profiles": profiles}


# TensorRT.


class _Enum(enum.IntEnum):
    pass


class TensorIOMode(_Enum):
    NONE, INPUT, OUTPUT = 0, 1, 2


class TensorLocation(_Enum):
    DEVICE, HOST = 0, 1


class ExecutionContextAllocationStrategy(_Enum):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = 0, 1, 2


class DynamicShapesKernelSpecializationStrategy(_Enum):
    LAZY, EAGER, NONE = 0, 1, 2


class CudaGraphStrategy(_Enum):
    DISABLED, WHOLE_GRAPH_CAPTURE = 0, 1


class FakeILogger:
    """trt.ILogger."""

    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def log(self, severity: int, message: str) -> None:
        raise NotImplementedError


DATA_TYPES = {
    "float32": "FLOAT",
    "float16": "HALF",
    "bfloat16": "BF16",
    "int64": "INT64",
    "int32": "INT32",
    "bool": "BOOL",
    "uint8": "UINT8",
}


class FakeTensorRT:
    """What the backend uses of the module `tensorrt_rtx`, or with `rtx=False` of `tensorrt`.

    computed_by: graph → the ONNX file that computes it. An engine file is any bytes whose sidecar lies beside it.
    """

    def __init__(
        self,
        device: FakeDevice,
        root: Path,
        computed_by: Mapping[str, Path],
        *,
        rtx: bool = True,
        version: str = "1.2.3",
    ) -> None:
        self.device = device
        self.rtx = rtx
        self.__version__ = version
        self.__name__ = "tensorrt_rtx" if rtx else "tensorrt"
        self.ILogger = FakeILogger
        self.TensorIOMode, self.TensorLocation = TensorIOMode, TensorLocation
        self.ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy
        if rtx:
            self.DynamicShapesKernelSpecializationStrategy = DynamicShapesKernelSpecializationStrategy
            self.CudaGraphStrategy = CudaGraphStrategy
        self.computed_by = computed_by
        self.sidecars: dict[str, dict[str, Any]] = {}
        for path in (root / "engines").glob("*.json"):
            digest = hashlib.sha256(path.with_suffix(".engine").read_bytes()).hexdigest()
            self.sidecars[digest] = json.loads(path.read_text())
        self.contexts: list[FakeContext] = []
        self.loads: list[str] = []
        self.fail: str | None = None
        """Profile whose runs fail."""
        self.cache_content = b"compiled:"
        self.capturable = True

    def Runtime(self, logger: FakeILogger) -> FakeRuntime:  # noqa: N802
        return FakeRuntime(self, logger)


class FakeRuntime:
    """trt.Runtime."""

    def __init__(self, trt: FakeTensorRT, logger: FakeILogger) -> None:
        self._trt, self.logger = trt, logger

    def deserialize_cuda_engine(self, content: Any) -> FakeEngine | None:
        sidecar = self._trt.sidecars.get(hashlib.sha256(bytes(content)).hexdigest())
        if sidecar is None:
            self.logger.log(FakeILogger.INFO, "Loaded engine size: 0 MiB")
            self.logger.log(FakeILogger.ERROR, "Error Code 2: the magic tag\n does not match")
            return None
        self._trt.loads.append(sidecar["graph"])
        return FakeEngine(self._trt, sidecar, self.logger)


class FakeEngine:
    """trt.ICudaEngine."""

    def __init__(self, trt: FakeTensorRT, sidecar: dict[str, Any], logger: FakeILogger) -> None:
        self.trt, self.logger = trt, logger
        self.graph = sidecar["graph"]
        self.profiles = sidecar["profiles"]
        self.inputs = {port["name"]: port["dtype"] for port in sidecar["inputs"]}
        self.outputs = {port["name"]: port["dtype"] for port in sidecar["outputs"]}
        self.dtypes = self.inputs | self.outputs
        self.num_io_tensors = len(self.dtypes)
        self.num_optimization_profiles = len(self.profiles)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            str(trt.computed_by[self.graph]), options, providers=["CPUExecutionProvider"]
        )

    def get_tensor_name(self, index: int) -> str:
        return list(self.dtypes)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=DATA_TYPES[self.dtypes[name]])

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation.DEVICE

    def get_device_memory_size_for_profile_v2(self, index: int) -> int:
        return self.activation_bytes(index)

    def activation_bytes(self, index: int) -> int:
        """Differs from profile to profile."""
        return 1024 * (1 + sum(math.prod(shape) for shape in self.profiles[index]["outputs"].values()) % 97)

    def create_runtime_config(self) -> FakeRuntimeConfig:
        return FakeRuntimeConfig(self.trt)

    def create_execution_context(self, how: Any) -> FakeContext:
        if self.trt.rtx:
            assert isinstance(how, FakeRuntimeConfig)
            strategy = how.strategy
            if how.dynamic_shapes_kernel_specialization_strategy != DynamicShapesKernelSpecializationStrategy.EAGER:
                raise DeviceFault("a recording would keep the kernels that run until the right ones are compiled")
            if how.cache is not None:
                how.cache.entries.add(self.graph)
        else:
            strategy = how
        if strategy != ExecutionContextAllocationStrategy.USER_MANAGED:
            raise DeviceFault("every context would take memory of its own")
        return FakeContext(self)


class FakeRuntimeConfig:
    """trt.IRuntimeConfig."""

    def __init__(self, trt: FakeTensorRT) -> None:
        self._trt = trt
        self.strategy = ExecutionContextAllocationStrategy.STATIC
        self.dynamic_shapes_kernel_specialization_strategy = DynamicShapesKernelSpecializationStrategy.LAZY
        self.cuda_graph_strategy = CudaGraphStrategy.DISABLED
        self.cache: FakeRuntimeCache | None = None

    def set_execution_context_allocation_strategy(self, strategy: ExecutionContextAllocationStrategy) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> FakeRuntimeCache:
        return FakeRuntimeCache(self._trt)

    def set_runtime_cache(self, cache: FakeRuntimeCache) -> bool:
        self.cache = cache
        return True


class FakeRuntimeCache:
    """trt.IRuntimeCache: which graphs were compiled."""

    def __init__(self, trt: FakeTensorRT) -> None:
        self._head = trt.cache_content
        self.entries: set[str] = set()

    def deserialize(self, content: bytes) -> bool:
        if not content.startswith(self._head):
            return False
        self.entries = set(content[len(self._head) :].decode().split(","))
        return True

    def serialize(self) -> bytes:
        return self._head + ",".join(sorted(self.entries)).encode()


class FakeContext:
    """trt.IExecutionContext."""

    def __init__(self, engine: FakeEngine) -> None:
        self._engine, self._trt, self._device = engine, engine.trt, engine.trt.device
        taken = {c.active_optimization_profile for c in self._trt.contexts if c._engine is engine}
        self.active_optimization_profile = -1 if 0 in taken else 0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._memory: tuple[int, int] | None = None
        self._warm = False
        self._trt.contexts.append(self)

    @property
    def _profile(self) -> dict[str, Any]:
        if self.active_optimization_profile < 0:
            raise DeviceFault(f"a context of {self._engine.graph} has no profile")
        return self._engine.profiles[self.active_optimization_profile]

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        assert stream == self._device.stream
        others = [c for c in self._trt.contexts if c is not self and c._engine is self._engine]
        if any(c.active_optimization_profile == index for c in others):
            raise DeviceFault(f"two contexts have the profile {index} of {self._engine.graph}")
        self.active_optimization_profile = index
        self._shapes.clear()
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if list(shape) != self._profile["inputs"][name]:
            self._engine.logger.log(FakeILogger.ERROR, f"{name}: {shape} does not satisfy the profile")
            return False
        self._shapes[name] = tuple(shape)
        return True

    def infer_shapes(self) -> list[str]:
        return [name for name in self._engine.inputs if name not in self._shapes]

    def get_tensor_shape(self, name: str) -> list[int]:
        return (self._profile["inputs"] | self._profile["outputs"])[name]

    def update_device_memory_size_for_shapes(self) -> int:
        if self.infer_shapes():
            raise DeviceFault("the size of the memory is asked for before the shapes were given")
        return self._engine.activation_bytes(self.active_optimization_profile)

    def set_device_memory(self, address: int, size: int) -> None:
        if address % 256 or size < self._engine.activation_bytes(self.active_optimization_profile):
            raise DeviceFault("the memory for intermediate results is not aligned, or too small")
        self._device.block(address, size)
        self._memory = (address, self._engine.activation_bytes(self.active_optimization_profile))

    def set_tensor_address(self, name: str, address: int) -> bool:
        if name not in self._engine.dtypes:
            return False
        if address % 256 or not address:
            raise DeviceFault(f"{name} is bound to {address:#x}, which is not aligned")
        self._addresses[name] = address
        return True

    def is_stream_capturable(self, stream: int) -> bool:
        return self._trt.capturable

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == self._device.stream
        profile = self._profile
        name = profile["name"]
        if self._trt.fail == name:
            self._engine.logger.log(FakeILogger.ERROR, "Error Code 1: Cuda Runtime\n (an illegal memory access)")
            return False
        if self.infer_shapes() or self._memory is None:
            raise DeviceFault(f"{name} runs without shapes or memory")
        unset = set(self._engine.dtypes) - set(self._addresses)
        if unset:
            raise DeviceFault(f"{name} runs without an address for {sorted(unset)}")
        if self._device.recording is not None and not self._warm:
            raise DeviceFault(f"{name} is recorded before it ever ran")
        self._warm = True
        shapes = {port: tuple(shape) for port, shape in (profile["inputs"] | profile["outputs"]).items()}
        run = Enqueued(name, dict(self._addresses), shapes)
        spans = {
            port: (run.addresses[port], math.prod(shape) * ITEM_BYTES[self._engine.dtypes[port]])
            for port, shape in shapes.items()
        }
        reads = {port: spans[port] for port in profile["inputs"]}
        writes = {port: spans[port] for port in profile["outputs"]} | {"intermediate results": self._memory}
        self._device.put_run(run, reads, writes, lambda: self._compute(run, spans))
        return True

    def _compute(self, run: Enqueued, spans: Mapping[str, tuple[int, int]]) -> None:
        assert self._memory is not None
        at, size = self._memory
        self._device.store(at, np.full(size, RUBBISH, np.uint8))
        arrays = {}
        for port, dtype in self._engine.inputs.items():
            arrays[port] = self._device.load(*spans[port]).view(np_dtype(dtype)).reshape(run.shapes[port])
        run.values, run.count = arrays, run.count + 1
        results = compute(self._engine.session, arrays, self._engine.outputs)
        for port in self._engine.outputs:
            content = results.get(port)
            if content is None:  # an output that the graph behind this engine does not have
                content = np.full(spans[port][1], RUBBISH, np.uint8)
            elif content.shape != run.shapes[port]:
                raise DeviceFault(f"{run.profile}: {port} is {content.shape}, not {run.shapes[port]}")
            self._device.store(spans[port][0], np.ascontiguousarray(content).reshape(-1).view(np.uint8))


def np_dtype(dtype: str) -> np.dtype[Any]:
    """bfloat16 travels as uint16."""
    return np.dtype("uint16" if dtype == "bfloat16" else dtype)


def compute(session: Any, arrays: Mapping[str, np.ndarray], outputs: Any) -> dict[str, np.ndarray]:
    """Run a real ONNX Runtime session; inputs and outputs that its graph does not have are left out."""
    known = {port.name for port in session.get_inputs()}
    names = [port.name for port in session.get_outputs() if port.name in outputs]
    feeds = {name: array for name, array in arrays.items() if name in known}
    return dict(zip(names, session.run(names, feeds), strict=True))


# ONNX Runtime with CUDA.


class FakeOnnxRuntime:
    """What the backend uses of onnxruntime-gpu: sessions that bind addresses of the fake device."""

    def __init__(
        self,
        device: FakeDevice,
        *,
        provider: str = "CUDAExecutionProvider",
        records: bool = True,
        unknown: str | None = None,
        unrecordable: str | None = None,
        failing: str | None = None,
    ) -> None:
        """An option of the provider's that it doesn't know, can't record with, fails with when it runs."""
        self.__version__ = "1.99"
        self._unknown, self._unrecordable, self.failing = unknown, unrecordable, failing
        self._device, self._provider = device, provider
        self.records = records
        """Whether sessions with CUDA graphs open, as they do when all nodes run on the GPU."""
        self.fail_recording = False
        self.fail = False
        self.sessions: list[FakeSession] = []

    def get_available_providers(self) -> list[str]:
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def SessionOptions(self) -> Any:  # noqa: N802
        return SimpleNamespace()

    def RunOptions(self) -> FakeRunOptions:  # noqa: N802
        return FakeRunOptions()

    def InferenceSession(  # noqa: N802
        self, path: str, options: Any, providers: list[Any], enable_fallback: int = 1
    ) -> FakeSession:
        (name, settings), fallback = providers
        assert (name, fallback) == ("CUDAExecutionProvider", "CPUExecutionProvider")
        assert settings["user_compute_stream"] == str(self._device.stream)
        if settings["enable_cuda_graph"] == "1" and (not self.records or self._unrecordable in settings):
            raise RuntimeError("This session cannot use the graph capture feature as requested\n by the user")
        provider = self._provider
        if self._unknown in settings:
            if not enable_fallback:
                raise RuntimeError(f"Unknown provider option: {self._unknown!r}")
            print("*************** EP Error ***************")
            provider = fallback
        self.sessions.append(FakeSession(self, self._device, path, provider, settings))
        return self.sessions[-1]


class FakeRunOptions:
    """onnxruntime.RunOptions."""

    def __init__(self) -> None:
        self.entries: dict[str, str] = {}

    def add_run_config_entry(self, key: str, value: str) -> None:
        self.entries[key] = value


class FakeBinding:
    """onnxruntime.IOBinding."""

    def __init__(self) -> None:
        self.inputs: dict[str, Any] = {}
        self.outputs: dict[str, Any] = {}

    def bind_input(self, name: str, kind: str, index: int, dtype: Any, shape: Any, address: int) -> None:
        assert (kind, index) == ("cuda", 0)
        self.inputs[name] = (np.dtype(dtype), tuple(shape), address)

    def bind_output(self, name: str, kind: str, index: int, dtype: Any, shape: Any, address: int) -> None:
        assert (kind, index) == ("cuda", 0)
        self.outputs[name] = (np.dtype(dtype), tuple(shape), address)


class FakeSession:
    """onnxruntime.InferenceSession with the CUDA execution provider."""

    def __init__(
        self, ort: FakeOnnxRuntime, device: FakeDevice, path: str, provider: str, settings: dict[str, str]
    ) -> None:
        self._ort, self._device, self._provider, self.settings = ort, device, provider, settings
        self._records = settings["enable_cuda_graph"] == "1"
        self.name = Path(path).stem
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.recorded: dict[int, FakeBinding] = {}
        self.launches = 0

    def get_providers(self) -> list[str]:
        return [self._provider]

    def io_binding(self) -> FakeBinding:
        return FakeBinding()

    def run_with_iobinding(self, binding: FakeBinding, options: FakeRunOptions) -> None:
        assert options.entries["disable_synchronize_execution_providers"] == "1"
        if self._ort.fail or self._ort.failing in self.settings:
            raise RuntimeError("CUDA failure 700:\n an illegal memory access was encountered")
        number = int(options.entries["gpu_graph_id"])
        if self._records and number != -1:
            if self._ort.fail_recording:
                raise RuntimeError("CUDA failure 900: operation not permitted\n when stream is capturing")
            before = self.recorded.setdefault(number, binding)
            # A real session launches what it recorded, whatever is bound.
            if (before.inputs, before.outputs) != (binding.inputs, binding.outputs):
                raise DeviceFault(
                    f"graph {number} of {self.name} is launched on other buffers than it was recorded on"
                )
            self.launches += before is not binding
        self._put(binding)

    def _put(self, binding: FakeBinding) -> None:
        def span(bound: Any) -> tuple[int, int]:
            dtype, shape, address = bound
            return address, math.prod(shape) * dtype.itemsize

        reads = {name: span(bound) for name, bound in binding.inputs.items()}
        writes = {name: span(bound) for name, bound in binding.outputs.items()}
        both = binding.inputs | binding.outputs
        run = Enqueued(self.name, {n: b[2] for n, b in both.items()}, {n: b[1] for n, b in both.items()})

        def do() -> None:
            arrays = {
                name: self._device.load(*reads[name]).view(dtype).reshape(shape)
                for name, (dtype, shape, _) in binding.inputs.items()
            }
            run.values, run.count = arrays, run.count + 1
            for name, content in compute(self._session, arrays, binding.outputs).items():
                dtype, shape, address = binding.outputs[name]
                if (content.dtype, content.shape) != (dtype, shape):
                    raise DeviceFault(f"{self.name}: {name} is {content.dtype} {content.shape}, not {dtype} {shape}")
                self._device.store(address, np.ascontiguousarray(content).reshape(-1).view(np.uint8))

        self._device.put_run(run, reads, writes, do)
