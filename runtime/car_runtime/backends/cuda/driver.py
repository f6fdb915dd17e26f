"""The GPU by way of cuda-python: what the GPU backends need of the CUDA runtime, and nothing else.

`Device` is all that they see; `CudaDevice` is the real one. Addresses are integers, sizes are bytes. Everything that
is not said to wait is put on the device's one stream and returns at once; one thread at a time may do that.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from threading import local
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from car_runtime.backends.cuda.kernels import Binary, Grid, kernels
from car_runtime.errors import BackendError, RunError
from car_runtime.system.gpu import Gpu, describe_status, import_runtime, probe

_OUT_OF_MEMORY, _NOT_READY = 2, 600
_SHARED_BY_DEFAULT = 48 * 1024
"""Bytes of dynamic shared memory that a kernel gets without asking."""
_SCRATCH = (ctypes.c_void_p, ctypes.c_void_p)
_MORE_MEMORY = "close other programs that use the GPU, or use a plan with smaller batches"
_C_TYPES = {"i32": ctypes.c_int32, "i64": ctypes.c_int64}

Event = Any
"""A point on the stream."""
Graph = Any
"""Work recorded from the stream, to be launched again as a whole."""
HostBlock = NDArray[np.uint8]
"""Page-locked host memory, which the GPU reads and writes while the program goes on."""


class CudaError(RunError):
    """A call of the CUDA runtime that failed."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code

    @property
    def out_of_memory(self) -> bool:
        """Whether the GPU's memory did not suffice."""
        return self.code == _OUT_OF_MEMORY


class Device(Protocol):
    """A GPU with one stream. Failures are CudaErrors."""

    @property
    def gpu(self) -> Gpu:
        """What it is."""
        ...

    @property
    def stream(self) -> int:
        """The stream's handle, as TensorRT and ONNX Runtime take it."""
        ...

    def malloc(self, size: int) -> int:
        """Address of new device memory, a multiple of 256."""
        ...

    def free(self, address: int) -> None:
        """Give memory back. No work on it may be pending."""
        ...

    def malloc_host(self, size: int) -> HostBlock:
        """New page-locked memory."""
        ...

    def free_host(self, block: HostBlock) -> None:
        """Give it back. No copy from or to it may be pending."""
        ...

    def to_device(self, target: int, block: HostBlock, size: int) -> None:
        """Copy from page-locked memory, which must stay as it is until that is done."""
        ...

    def to_host(self, block: HostBlock, source: int, size: int) -> None:
        """Copy to page-locked memory."""
        ...

    def on_device(self, target: int, source: int, size: int) -> None:
        """Copy within device memory."""
        ...

    def on_device_spaced(
        self, target: int, source: int, size: int, spacing: int, count: int, target_spacing: int
    ) -> None:
        """Copy `count` pieces of `size` bytes: one every `spacing` bytes, in the target every `target_spacing`."""
        ...

    def event(self) -> Event:
        """A new event, with timing."""
        ...

    def record(self, event: Event) -> None:
        """Put the event on the stream, here."""
        ...

    def record_in_graph(self, event: Event) -> None:
        """While recording: put the event into the recording; each launch of that gives it a time."""
        ...

    def done(self, event: Event) -> bool:
        """Whether the stream has got there."""
        ...

    def wait(self, event: Event) -> None:
        """Wait until the stream gets there. Any thread may call this at any time."""
        ...

    def elapsed(self, begin: Event, end: Event) -> float:
        """Seconds between two events that are done."""
        ...

    def free_event(self, event: Event) -> None:
        """Let go of an event."""
        ...

    def synchronize(self) -> None:
        """Wait for everything on the stream."""
        ...

    def begin_capture(self) -> None:
        """Start recording: from here on, what is put on the stream is not done."""
        ...

    def end_capture(self) -> Graph:
        """Stop recording. Raises CudaError where something could not be recorded; the stream is usable either way."""
        ...

    def launch(self, graph: Graph) -> None:
        """Put recorded work on the stream."""
        ...

    def free_graph(self, graph: Graph) -> None:
        """Let go of a graph; where it still runs, it ends first."""
        ...

    def load_kernels(self, code: Mapping[str, bytes]) -> None:
        """Take compiled kernels by name, for this GPU; nothing may be recorded meanwhile."""
        ...

    def put_kernel(self, name: str, grid: Grid, arguments: Sequence[int]) -> None:
        """Put a launch of a loaded kernel on the stream; arguments in its order, addresses as numbers."""
        ...

    def free_memory(self) -> int:
        """Bytes of device memory that nobody uses."""
        ...

    def close(self) -> None:
        """Let go of the stream and of kernels. No work may be pending."""
        ...


class CudaDevice:
    """The first GPU that this process sees."""

    def __init__(self) -> None:
        self.gpu = probe()
        self._runtime = import_runtime()
        self._kernels: dict[str, tuple[Any, Any, tuple[Any, ...]]] = {}
        self._modules: list[Any] = []
        self._bound = local()
        self._call("cudaSetDevice", 0)
        # Work of other streams of the process, the default one above all, is no reason to wait.
        self._stream = self._call("cudaStreamCreateWithFlags", self._runtime.cudaStreamNonBlocking)
        self.stream = int(self._stream)
        kinds = self._runtime.cudaMemcpyKind
        self._to_device, self._to_host = kinds.cudaMemcpyHostToDevice, kinds.cudaMemcpyDeviceToHost
        self._on_device = kinds.cudaMemcpyDeviceToDevice
        # Other threads may allocate and wait while this one records.
        self._mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal

    def malloc(self, size: int) -> int:
        """cudaMalloc."""
        return int(self._call("cudaMalloc", size))

    def free(self, address: int) -> None:
        """cudaFree."""
        self._call("cudaFree", address)

    def malloc_host(self, size: int) -> HostBlock:
        """cudaHostAlloc, seen as an array."""
        address = int(self._call("cudaHostAlloc", size, 0))
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))

    def free_host(self, block: HostBlock) -> None:
        """cudaFreeHost."""
        self._call("cudaFreeHost", block.ctypes.data)

    def to_device(self, target: int, block: HostBlock, size: int) -> None:
        """cudaMemcpyAsync."""
        self._call("cudaMemcpyAsync", target, block.ctypes.data, size, self._to_device, self._stream)

    def to_host(self, block: HostBlock, source: int, size: int) -> None:
        """cudaMemcpyAsync."""
        self._call("cudaMemcpyAsync", block.ctypes.data, source, size, self._to_host, self._stream)

    def on_device(self, target: int, source: int, size: int) -> None:
        """cudaMemcpyAsync."""
        self._call("cudaMemcpyAsync", target, source, size, self._on_device, self._stream)

    def on_device_spaced(
        self, target: int, source: int, size: int, spacing: int, count: int, target_spacing: int
    ) -> None:
        """cudaMemcpy2DAsync."""
        pieces = (target, target_spacing, source, spacing, size, count)
        self._call("cudaMemcpy2DAsync", *pieces, self._on_device, self._stream)

    def event(self) -> Event:
        """cudaEventCreate."""
        return self._call("cudaEventCreate")

    def record(self, event: Event) -> None:
        """cudaEventRecord."""
        self._call("cudaEventRecord", event, self._stream)

    def record_in_graph(self, event: Event) -> None:
        """cudaEventRecordWithFlags: without the flag it would only be a dependency of what is recorded."""
        flag = self._runtime.cudaEventRecordExternal
        self._call("cudaEventRecordWithFlags", event, self._stream, flag)

    def done(self, event: Event) -> bool:
        """cudaEventQuery."""
        (status,) = self._runtime.cudaEventQuery(event)
        if int(status) in (0, _NOT_READY):
            return int(status) == 0
        raise self._error("cudaEventQuery", status)

    def wait(self, event: Event) -> None:
        """cudaEventSynchronize."""
        self._call("cudaEventSynchronize", event)

    def elapsed(self, begin: Event, end: Event) -> float:
        """cudaEventElapsedTime, in seconds."""
        return float(self._call("cudaEventElapsedTime", begin, end)) / 1000

    def free_event(self, event: Event) -> None:
        """cudaEventDestroy."""
        self._call("cudaEventDestroy", event)

    def synchronize(self) -> None:
        """cudaStreamSynchronize."""
        self._call("cudaStreamSynchronize", self._stream)

    def begin_capture(self) -> None:
        """cudaStreamBeginCapture."""
        self._call("cudaStreamBeginCapture", self._stream, self._mode)

    def end_capture(self) -> Graph:
        """cudaStreamEndCapture and cudaGraphInstantiate."""
        recorded = self._call("cudaStreamEndCapture", self._stream)
        try:
            return self._call("cudaGraphInstantiate", recorded, 0)
        finally:
            self._call("cudaGraphDestroy", recorded)

    def launch(self, graph: Graph) -> None:
        """cudaGraphLaunch."""
        self._call("cudaGraphLaunch", graph, self._stream)

    def free_graph(self, graph: Graph) -> None:
        """cudaGraphExecDestroy."""
        self._call("cudaGraphExecDestroy", graph)

    def load_kernels(self, code: Mapping[str, bytes]) -> None:
        """cuModuleLoadData, in the context that the runtime made for this device."""
        self._context = self._driver_call("cuCtxGetCurrent")
        for name, cubin in code.items():
            described = kernels()[name]
            binary = described.targets[self.gpu.target]
            module = self._driver_call("cuModuleLoadData", cubin)
            self._modules.append(module)
            function = self._driver_call("cuModuleGetFunction", module, binary.symbol.encode())
            if binary.shared > _SHARED_BY_DEFAULT:
                which = self._driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                self._driver_call("cuFuncSetAttribute", function, which, binary.shared)
            # Triton adds two addresses of scratch memory; the build refuses kernels that want any.
            types = (*(_C_TYPES.get(kind, ctypes.c_void_p) for kind in described.arguments.values()), *_SCRATCH)
            self._kernels[name] = function, self._launch_config(binary), types

    def _launch_config(self, binary: Binary) -> Any:
        """CUlaunchConfig, for any grid. A kernel that waits may start early: programmatic dependent launch."""
        driver, config = self._driver, self._driver.CUlaunchConfig()
        config.blockDimX, config.blockDimY, config.blockDimZ = binary.threads, 1, 1
        config.sharedMemBytes, config.hStream = binary.shared, driver.CUstream(self.stream)
        if binary.waits:
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            config.attrs, config.numAttrs = [attribute], 1
        return config

    def put_kernel(self, name: str, grid: Grid, arguments: Sequence[int]) -> None:
        """cuLaunchKernelEx. Unlike the runtime, the driver takes no context by itself in a thread that has none."""
        if not hasattr(self._bound, "here"):
            self._driver_call("cuCtxSetCurrent", self._context)
            self._bound.here = True
        function, config, types = self._kernels[name]
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        self._driver_call("cuLaunchKernelEx", config, function, ((*arguments, 0, 0), types), 0)

    def free_memory(self) -> int:
        """cudaMemGetInfo."""
        free, _ = self._call("cudaMemGetInfo")
        return int(free)

    def close(self) -> None:
        """cudaStreamDestroy, and cuModuleUnload of what was loaded."""
        self._call("cudaStreamDestroy", self._stream)
        self._kernels.clear()
        while self._modules:
            self._driver_call("cuModuleUnload", self._modules.pop())

    def _call(self, name: str, *arguments: Any) -> Any:
        """The function's value: None, one, or a tuple of them."""
        status, *values = getattr(self._runtime, name)(*arguments)
        if int(status) != 0:
            raise self._error(name, status)
        return values[0] if len(values) == 1 else tuple(values) or None

    @cached_property
    def _driver(self) -> Any:
        """cuda-python's module of the driver; kernels alone need it."""
        from cuda.bindings import driver

        return driver

    def _driver_call(self, name: str, *arguments: Any) -> Any:
        status, *values = getattr(self._driver, name)(*arguments)
        if int(status) != 0:
            _, words = self._driver.cuGetErrorString(status)
            words = words.decode() if isinstance(words, bytes) else words
            remedy = "upgrade the driver" if name.startswith("cuModule") else "close the plan and open it again"
            remedy = _MORE_MEMORY if int(status) == _OUT_OF_MEMORY else f"{remedy}, or use --backend ort-cuda"
            raise CudaError(f"CUDA failed in {name}: {words}; {remedy}", int(status))
        return values[0] if values else None

    def _error(self, name: str, status: Any) -> CudaError:
        remedy = "close the plan and open it again"
        if int(status) == _OUT_OF_MEMORY:
            remedy = _MORE_MEMORY
        return CudaError(f"CUDA failed in {name}: {describe_status(self._runtime, status)}; {remedy}", int(status))


@contextmanager
def opening() -> Iterator[None]:
    """What fails on the device while a backend opens is a reason to take another one: a BackendError."""
    try:
        yield
    except CudaError as error:
        raise BackendError(str(error)) from error
