"""TensorRT for RTX (`rtx`) and TensorRT (`trt`): engines that were compiled for this GPU, replayed as CUDA graphs.

An engine has one profile for each static form of its graph and one copy of the weights. Each profile gets its own
execution context, on first use, and all contexts share one piece of memory for intermediate results, since everything
runs in the order of one stream. A profile's first run on a set of addresses is an ordinary one, which warms it up;
the second is recorded as a CUDA graph, which then and from then on is launched instead.

What an engine has beyond its graph is this backend's own: `key_bias`, added to the scores of attention, and at the
first scale, which has no past, a past of one token that `key_bias` takes out (docs/reference/plan-format.md).
"""

from __future__ import annotations

import contextlib
import importlib
import mmap
from collections import OrderedDict, deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from car_runtime.backends.base import Buffer
from car_runtime.backends.cuda.buffers import ALIGNMENT, CudaBuffers, DeviceArray, Memory, device_array
from car_runtime.backends.cuda.driver import CudaDevice, Device, Graph, opening
from car_runtime.backends.tensorrt.engine_metadata import EngineMetadata, Profile, build_command, engines_for
from car_runtime.backends.tensorrt.runtime_cache import RuntimeCache
from car_runtime.backends.tensorrt.spec import FLAVOURS, RTX, TRT
from car_runtime.backends.tensorrt.trust import digest, is_built_here
from car_runtime.errors import BackendError, CarError, PlanError, RunError, one_line
from car_runtime.format.manifest import Manifest
from car_runtime.system.gpu import probe

GRAPHS = 128
"""Recordings kept, the latest used: ten scales at two batch sizes are twenty, for each set of buffers in use."""
_KEY_BIAS = "key_bias"
MASKED = -1e9
"""`key_bias` of a key that nobody may see: its share is exactly 0 in float32."""

# The encoder serves editing only, and all branches but the default one those who name them: loaded when asked for.
_AT_ONCE = ("step", "condition", "control", "decoder")
_OF_A_BRANCH = ("control", "condition", "branch")
_DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT64": "int64", "INT32": "int32"}


class TensorRT(CudaBuffers):
    """The backends `rtx` and `trt`. `device` and `module` are given by tests alone."""

    guided_only = True
    max_mixed = 1

    def __init__(
        self,
        root: Path,
        manifest: Manifest,
        flavour: str,
        device: Device | None = None,
        module: Any = None,
        trust_engines: bool = False,
    ) -> None:
        self.name = flavour
        self._root = root
        self._trusted = trust_engines
        # The driver first: without one TensorRT does not say what is the matter.
        gpu = device.gpu if device is not None else probe()
        self._trt = module if module is not None else _import_tensorrt(flavour)
        self._metadata = engines_for(root, manifest, flavour, gpu.target, self._trt.__version__)
        self.batches = tuple(sorted({_batch(profile.name) for profile in self._metadata["step"].profiles}))
        self._log = _make_log(self._trt)
        self._device = device if device is not None else CudaDevice()
        self._free_at_start = self._device.free_memory()
        self._memory = Memory(self._device)
        self._activations = _Activations(self._memory)
        # None: it ran once on these addresses, and the next time is worth recording.
        self._graphs: OrderedDict[tuple[object, ...], Graph | None] = OrderedDict()
        self._uncaptured: dict[str, str] = {}
        self._launches = 0
        self._own: dict[tuple[str, str], DeviceArray] = {}
        self._cache = RuntimeCache(root, flavour, gpu, trust_engines) if flavour == "rtx" else None
        self._runtime: Any = None
        self._engines: dict[str, _Engine] = {}
        try:
            self._runtime = self._make_runtime()
            default = manifest.model.default_branch
            for graph in [*_AT_ONCE, *(f"{kind}.{default}" for kind in _OF_A_BRANCH)]:
                if graph in self._metadata:
                    self._load(graph)
        except BaseException:
            self.close()
            raise

    def step_graph(self, scale: int, batch: int) -> str:
        """The profile of this scale and batch size."""
        return f"step.{scale:02}.b{batch}"

    def run(self, graph: str, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        """Put a graph, or one profile of the step, on the stream."""
        with self._memory.lock:
            self._memory.check_open()
            engine, index = self._find(graph, inputs)
            profile = engine.metadata.profiles[index]
            bound = self._bind(engine.metadata, profile, inputs, outputs)
            key = (profile.name, *[array.address for array in bound.values()])
            context = self._context(engine, index)
            recorded = self._graphs.get(key)
            if recorded is None and key in self._graphs and profile.name not in self._uncaptured:
                recorded = self._record(context, profile, bound)
            if recorded is None:
                self._enqueue(context, profile, bound)
            else:
                self._device.launch(recorded)
                self._launches += 1
                if self._cache is not None:  # what an image needs is compiled by now
                    self._cache.save()
            self._remember(key, recorded)

    def report(self) -> dict[str, Any]:
        """The engine, the GPU, memory in bytes, and what was recorded."""
        gpu = self._device.gpu
        with self._memory.lock:
            facts: dict[str, Any] = {
                "engine": f"{self._trt.__name__} {self._trt.__version__}",
                "gpu": gpu.name,
                "target": gpu.target,
                "driver": gpu.driver,
                "weight_bytes": sum(engine.metadata.weight_bytes or 0 for engine in self._engines.values()),
                "buffer_bytes": self._memory.used - self._activations.size,
                "activation_bytes": self._activations.size,
                "contexts": sum(len(engine.contexts) for engine in self._engines.values()),
                "graphs_captured": sum(recorded is not None for recorded in self._graphs.values()),
                "graphs_launched": self._launches,
                "not_captured": dict(self._uncaptured),
            }
            if not self._memory.closed:
                # What the GPU's free memory has shrunk by: weights, kernels and all; other programs count too.
                facts["memory_bytes"] = max(self._free_at_start - self._device.free_memory(), self._memory.used)
            if self._cache is not None:
                facts["runtime_cache"] = self._cache.facts()
        return facts

    def close(self) -> None:
        """Free the engines and all memory. Closing twice does nothing."""
        with self._memory.lock:
            if self._memory.closed:
                return
            if self._cache is not None:
                self._cache.save()
            with contextlib.suppress(CarError):
                self._device.synchronize()
                for recorded in self._graphs.values():
                    if recorded is not None:
                        self._device.free_graph(recorded)
            self._graphs.clear()
            # Contexts go before engines, engines before the runtime, and that before its log.
            for engine in self._engines.values():
                engine.contexts.clear()
            self._engines.clear()
            self._cache = None
            self._runtime = None
            self._own.clear()
            self._memory.close()
            with contextlib.suppress(CarError):
                self._device.close()

    # Engines.

    def _make_runtime(self) -> Any:
        try:
            return self._trt.Runtime(self._log)
        except Exception as error:
            raise BackendError(
                f"{self._title} {self._trt.__version__} does not start: {self._log.take()}; "
                f"check that its CUDA version fits the driver's, {self._device.gpu.driver}"
            ) from error

    def _load(self, graph: str) -> _Engine:
        """Bring an engine onto the GPU."""
        metadata = self._metadata[graph]
        with metadata.engine.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            self._check_trusted(metadata, content)
            loaded = self._runtime.deserialize_cuda_engine(content)
        if loaded is None:
            raise BackendError(
                f"{self._title} cannot load {metadata.engine.name}: {self._log.take()}; "
                f"build the engines again: {self._remedy}"
            )
        _check_engine(self._trt, loaded, metadata)
        engine = _Engine(loaded, metadata)
        self._engines[graph] = engine
        return engine

    def _check_trusted(self, metadata: EngineMetadata, content: mmap.mmap) -> None:
        """Raise BackendError where an engine was not built here, and the person doesn't trust the plan."""
        with memoryview(content) as view:
            if self._trusted or is_built_here(digest(view)):
                return
        raise BackendError(
            f"{metadata.engine.name} was not built on this machine, and an engine is code; build it here: "
            f"{self._remedy}, or if you trust who made it add --trust-engines"
        )

    def _find(self, graph: str, inputs: Mapping[str, Buffer]) -> tuple[_Engine, int]:
        """The engine of a graph, and the profile of that name or, where the graph has none, of these shapes."""
        name = graph if graph in self._metadata else graph.partition(".")[0]
        if name not in self._engines:
            if name not in self._metadata:
                raise RunError(
                    f"there is no {self._title} engine of {name!r} for {self._device.gpu.target}; "
                    f"build it: {self._remedy}"
                )
            self._load(name)
        engine = self._engines[name]
        if graph in engine.index:
            return engine, engine.index[graph]
        for index, profile in enumerate(engine.metadata.profiles):
            if all(port == _KEY_BIAS or _fits(inputs.get(port), shape) for port, shape in profile.inputs.items()):
                return engine, index
        given = ", ".join(f"{port} {list(buffer.shape)}" for port, buffer in inputs.items())
        raise RunError(
            f"the {self._title} engine of {name!r} has no profile {graph!r} for {given}; "
            f"it has {', '.join(engine.index)}; build the engines with the batch sizes that you want (--batch)"
        )

    def _context(self, engine: _Engine, index: int) -> Any:
        """The execution context of a profile; making it is what takes TensorRT for RTX its time to compile."""
        if index not in engine.contexts:
            profile = engine.metadata.profiles[index]
            try:
                engine.contexts[index] = self._make_context(engine, index, profile)
            except RuntimeError as error:
                raise self._failure(f"cannot prepare ({error})", profile) from error
        return engine.contexts[index]

    def _make_context(self, engine: _Engine, index: int, profile: Profile) -> Any:
        managed = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self._cache is None:
            context = engine.loaded.create_execution_context(managed)
        else:
            if engine.config is None:
                engine.config = self._runtime_config(engine.loaded)
            context = engine.loaded.create_execution_context(engine.config)
        if context is None:
            raise self._failure("cannot make a context for", profile)
        if context.active_optimization_profile != index:
            if not context.set_optimization_profile_async(index, self._device.stream):
                raise self._failure("refuses", profile)
            self._device.synchronize()
        for port, shape in profile.inputs.items():
            if not context.set_input_shape(port, shape):
                raise self._failure(f"refuses {port} {list(shape)} in", profile)
        vague = context.infer_shapes()
        if vague:
            raise self._failure(f"cannot work out {', '.join(vague)} in", profile)
        for port, shape in profile.outputs.items():
            if tuple(context.get_tensor_shape(port)) != shape:
                found = list(context.get_tensor_shape(port))
                raise self._failure(f"gives {port} {found}, not {list(shape)}, in", profile)
        size = max(
            engine.loaded.get_device_memory_size_for_profile_v2(index), context.update_device_memory_size_for_shapes()
        )
        address, reserved = self._activations.at_least(size, self._reserve(profile.name))
        context.set_device_memory(address, reserved)
        if self._cache is not None:
            self._cache.changed()
        return context

    def _runtime_config(self, loaded: Any) -> Any:
        """TensorRT for RTX compiles for the very shapes at once: a recording would keep a makeshift for ever."""
        trt = self._trt
        config = loaded.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED  # this backend records by itself
        assert self._cache is not None
        self._cache.attach(config)
        return config

    def _reserve(self, profile: str) -> int:
        """What the largest profile of the same batch size needs: asked for at once, it is asked for once."""
        sizes: list[int] = [
            engine.loaded.get_device_memory_size_for_profile_v2(index)
            for engine in self._engines.values()
            for name, index in engine.index.items()
            if _batch(name) == _batch(profile)
        ]
        return max(sizes)

    # Buffers.

    def _bind(
        self, metadata: EngineMetadata, profile: Profile, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]
    ) -> dict[str, DeviceArray]:
        """Every port of a profile → its buffer. What the caller doesn't have is this backend's own."""
        bound = {}
        for port, shape in profile.inputs.items():
            given = inputs.get(port)
            if port == _KEY_BIAS and given is None:
                bound[port] = self._key_bias(profile, inputs)
            elif given is None:
                raise RunError(f"{profile.name} was not given {port}; give it {list(shape)}")
            elif _is_no_past(given, shape):
                bound[port] = self._mine(f"past {metadata.inputs[port]} {shape}", shape, metadata.inputs[port])
            else:
                bound[port] = _fitting(profile, port, given, shape, metadata.inputs[port])
        for port, shape in profile.outputs.items():
            given = outputs.get(port)
            if given is None:
                bound[port] = self._scratch(metadata, profile, port)
            else:
                bound[port] = _fitting(profile, port, given, shape, metadata.outputs[port])
        return bound

    def _key_bias(self, profile: Profile, inputs: Mapping[str, Buffer]) -> DeviceArray:
        """Zeros, after MASKED for the past that stands where there is none."""
        (N,) = profile.inputs[_KEY_BIAS]
        past = next((port for port in profile.inputs if port.startswith("past_")), None)
        masked = past is not None and past in inputs and inputs[past].shape[0] == 0
        values = np.zeros(N, np.float32)
        values[: int(masked)] = MASKED
        return self._mine(f"key_bias {N} {masked}", (N,), "float32", values)

    def _mine(self, what: str, shape: tuple[int, ...], dtype: str, values: NDArray[Any] | None = None) -> DeviceArray:
        """A constant of this backend's own, zeros or `values`, made once."""
        array = self._own.get(("constant", what))
        if array is None:
            array = self._memory.zeros(shape, dtype) if values is None else self._memory.allocate(shape, dtype)
            if values is not None:
                self._memory.write(array, values)
            self._own["constant", what] = array
        return array

    def _scratch(self, metadata: EngineMetadata, profile: Profile, port: str) -> DeviceArray:
        """Where an output goes that nobody asked for: one buffer for all scales of a batch size."""
        batch = _batch(profile.name)
        key = ("scratch", f"{metadata.graph} {port} {batch}")
        if key not in self._own:
            shapes = [p.outputs[port] for p in metadata.profiles if _batch(p.name) == batch]
            largest = max(int(np.prod(shape)) for shape in shapes)
            self._own[key] = self._memory.allocate((largest,), metadata.outputs[port])
        shape = profile.outputs[port]
        return self._own[key][: int(np.prod(shape))].reshape(shape)

    # The stream.

    def _enqueue(self, context: Any, profile: Profile, bound: Mapping[str, DeviceArray]) -> None:
        """Put a profile on the stream. TensorRT wants aligned addresses: others are copied to ones that are."""
        after = []
        for port, array in bound.items():
            address = array.address
            if address % ALIGNMENT:
                aligned = self._aligned(profile, port, array)
                address = aligned.address
                if port in profile.inputs:
                    self._device.on_device(address, array.address, array.nbytes)
                else:
                    after.append((array.address, address, array.nbytes))
            if not context.set_tensor_address(port, address):
                raise self._failure(f"refuses the address of {port} in", profile)
        try:
            done = context.execute_async_v3(self._device.stream)
        except RuntimeError as error:
            raise self._failure(f"failed ({error}) in", profile) from error
        if not done:
            raise self._failure("failed in", profile)
        for target, source, size in after:
            self._device.on_device(target, source, size)

    def _aligned(self, profile: Profile, port: str, array: DeviceArray) -> DeviceArray:
        key = (profile.name, port)
        if key not in self._own:
            self._own[key] = self._memory.allocate(array.shape, array.dtype)
        return self._own[key]

    def _record(self, context: Any, profile: Profile, bound: Mapping[str, DeviceArray]) -> Graph | None:
        """What a run puts on the stream, as a graph. Where that can't be, every run goes the long way."""
        capturable = getattr(context, "is_stream_capturable", None)
        if capturable is not None and not capturable(self._device.stream):
            self._uncaptured[profile.name] = f"{self._title} says that it cannot be recorded"
            return None
        self._device.begin_capture()
        try:
            self._enqueue(context, profile, bound)
        except BaseException as error:
            with contextlib.suppress(RunError):
                self._device.free_graph(self._device.end_capture())
            if not isinstance(error, RunError):
                raise
            self._uncaptured[profile.name] = str(error)
            return None
        try:
            return self._device.end_capture()
        except RunError as error:
            self._uncaptured[profile.name] = str(error)
            return None

    def _remember(self, key: tuple[object, ...], recorded: Graph | None) -> None:
        """Keep a recording, or that there is none yet, as the latest; the oldest makes room."""
        self._graphs[key] = recorded
        self._graphs.move_to_end(key)
        while len(self._graphs) > GRAPHS:
            _, oldest = self._graphs.popitem(last=False)
            if oldest is not None:
                self._device.free_graph(oldest)

    @property
    def _title(self) -> str:
        return FLAVOURS[self.name].title

    @property
    def _remedy(self) -> str:
        return build_command(self._root, self.name, self._device.gpu.target)

    def _failure(self, what: str, profile: Profile) -> RunError:
        return RunError(
            f"{self._title} {what} {profile.name}: {self._log.take()}; build the engines again: {self._remedy}"
        )


class _Engine:
    """An engine on the GPU, and a context for each profile that was used."""

    def __init__(self, loaded: Any, metadata: EngineMetadata) -> None:
        self.loaded = loaded
        self.metadata = metadata
        self.index = {profile.name: i for i, profile in enumerate(metadata.profiles)}
        self.contexts: dict[int, Any] = {}
        self.config: Any = None


class _Activations:
    """Memory for intermediate results, shared by all contexts.

    What was recorded keeps the address that it had, so memory that became too small stays for those that fit in it.
    """

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._pieces: list[DeviceArray] = []

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(piece.nbytes for piece in self._pieces)

    def at_least(self, size: int, reserve: int) -> tuple[int, int]:
        """Address and size of a piece that holds `size` bytes; a new one holds `reserve` as well."""
        for piece in self._pieces:
            if piece.nbytes >= size:
                return piece.address, piece.nbytes
        piece = self._memory.allocate((max(size, reserve, ALIGNMENT),), "uint8")
        self._pieces.append(piece)
        return piece.address, piece.nbytes


def open_rtx(root: Path, manifest: Manifest, threads: int | None, trust_engines: bool = False) -> TensorRT:
    """TensorRT for RTX on the first GPU. Raises BackendError with the remedy where it can't run here."""
    with opening():
        return TensorRT(root, manifest, "rtx", trust_engines=trust_engines)


def open_trt(root: Path, manifest: Manifest, threads: int | None, trust_engines: bool = False) -> TensorRT:
    """Classic TensorRT on the first GPU. Raises BackendError with the remedy where it can't run here."""
    with opening():
        return TensorRT(root, manifest, "trt", trust_engines=trust_engines)


def _import_tensorrt(flavour: str) -> Any:
    module, spec = FLAVOURS[flavour].module, {"rtx": RTX, "trt": TRT}[flavour]
    try:
        return importlib.import_module(module)
    except Exception as error:
        raise BackendError(
            f"the backend {flavour!r} needs the package {module} ({one_line(error)}); run: {spec.install[0]}"
        ) from error


def _make_log(trt: Any) -> Any:
    """A logger that keeps the latest errors for the exception that follows them."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self._messages: deque[str] = deque(maxlen=8)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self._messages.append(" ".join(message.split()))

        def take(self) -> str:
            """What was logged since the last call, in one line."""
            messages = list(self._messages)
            self._messages.clear()
            return "; ".join(messages) or "it does not say why"

    return Log()


def _check_engine(trt: Any, loaded: Any, metadata: EngineMetadata) -> None:
    """Raise PlanError where an engine is not what its sidecar says."""
    problems = []
    found: dict[Any, dict[str, str]] = {trt.TensorIOMode.INPUT: {}, trt.TensorIOMode.OUTPUT: {}}
    for i in range(loaded.num_io_tensors):
        name = loaded.get_tensor_name(i)
        kind = loaded.get_tensor_dtype(name).name
        found[loaded.get_tensor_mode(name)][name] = _DTYPES.get(kind, kind.lower())
        if loaded.get_tensor_location(name) != trt.TensorLocation.DEVICE:
            problems.append(f"{name} is read on the host")
    for side, expected, mode in (
        ("inputs", metadata.inputs, trt.TensorIOMode.INPUT),
        ("outputs", metadata.outputs, trt.TensorIOMode.OUTPUT),
    ):
        problems += [
            f"of the {side}, {name} is {found[mode].get(name)}, not {expected.get(name)}"
            for name in sorted(set(expected) | set(found[mode]))
            if expected.get(name) != found[mode].get(name)
        ]
    if loaded.num_optimization_profiles != len(metadata.profiles):
        problems.append(f"it has {loaded.num_optimization_profiles} profiles, not {len(metadata.profiles)}")
    if problems:
        raise PlanError(
            f"{metadata.engine.name} is not what its sidecar says: {'; '.join(problems)}; build the engines again"
        )


def _batch(profile: str) -> int:
    """The batch size of `step.00.b4`; 1 for `control`, which has none."""
    ending = profile.rpartition(".b")[2]
    return int(ending) if ending.isdecimal() else 1


def _is_no_past(given: Buffer, shape: tuple[int, ...]) -> bool:
    """Whether a past of no tokens is given where the engine has one of a single token, which nobody sees."""
    return given.shape[0] == 0 and shape[0] == 1 and given.shape[1:] == shape[1:]


def _fits(given: Buffer | None, shape: tuple[int, ...]) -> bool:
    """Whether a buffer can be bound to an input of this shape."""
    return given is not None and (given.shape == shape or _is_no_past(given, shape))


def _fitting(profile: Profile, port: str, given: Buffer, shape: tuple[int, ...], dtype: str) -> DeviceArray:
    array = device_array(given)
    if array.shape != shape or array.dtype != dtype:
        raise RunError(
            f"{profile.name} was given {port} {array.dtype} {list(array.shape)}; give {dtype} {list(shape)}"
        )
    return array
