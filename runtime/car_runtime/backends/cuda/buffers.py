"""Buffers on a GPU: allocated once and used again, written and read by way of page-locked memory.

Everything happens in the order of the device's one stream, which makes reuse safe without waiting: what is put on the
stream later, on memory that somebody else gave back, comes after what was put there before.
"""

from __future__ import annotations

import heapq
import math
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from threading import Condition, RLock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from car_runtime.backends.base import Buffer, T
from car_runtime.backends.cuda.driver import CudaError, Device, Event, Graph, HostBlock
from car_runtime.errors import RunError

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "bool": 1, "uint8": 1}
ALIGNMENT = 256
"""What TensorRT asks of every address, and cudaMalloc gives."""
_GRAIN = 512
_SMALLEST_BLOCK = 4096
_HOST_LIMIT = 64 * 1024 * 1024
"""Page-locked bytes for copies on their way; beyond it a new copy waits for the oldest one."""


class DeviceArray:
    """A buffer, or a view of one, on the GPU: a shape, a dtype and an address."""

    __slots__ = ("__weakref__", "_owner", "address", "dtype", "shape")

    def __init__(self, shape: tuple[int, ...], dtype: str, address: int, owner: object) -> None:
        self.shape = shape
        self.dtype = dtype
        self.address = address
        self._owner = owner  # the memory is given back when its last view is gone

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    def __getitem__(self, rows: slice, /) -> DeviceArray:
        """A view of some rows of the first dimension."""
        start, stop, step = rows.indices(self.shape[0])
        assert step == 1
        row_bytes = math.prod(self.shape[1:]) * ITEM_BYTES[self.dtype]
        shape = (max(stop - start, 0), *self.shape[1:])
        return DeviceArray(shape, self.dtype, self.address + start * row_bytes, self._owner)

    def reshape(self, shape: tuple[int, ...], /) -> DeviceArray:
        """A view of the same elements in another shape."""
        assert math.prod(shape) == math.prod(self.shape), (shape, self.shape)
        return DeviceArray(shape, self.dtype, self.address, self._owner)

    def __repr__(self) -> str:
        return f"DeviceArray({self.dtype} {list(self.shape)} at {self.address:#x})"


class Mark:
    """A point on the stream, with its time."""

    __slots__ = ("__weakref__", "event", "replayed")

    def __init__(self, event: Event) -> None:
        self.event = event
        self.replayed: Mark | None = None
        """Of a mark within recorded work: behind the latest replay, which gives the mark its time."""


class Recording:
    """Work of the stream to be put there again, and the marks within it."""

    __slots__ = ("graph", "marks")

    def __init__(self, graph: Graph, marks: list[Mark]) -> None:
        self.graph = graph
        self.marks = marks


class _Owner:
    """Stands for a piece of device memory in use."""

    __slots__ = ("__weakref__",)


class _Staging:
    """A page-locked block, and the event after the last copy from or to it."""

    __slots__ = ("event", "host")

    def __init__(self, host: HostBlock, event: Event) -> None:
        self.host = host
        self.event = event


class Memory:
    """The memory of one device. `lock` is held by whoever puts work on the stream."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.lock = RLock()
        self.used = 0
        """Bytes taken from the device, in use or kept for the next taker."""
        self._closed = False
        self._addresses: dict[int, int] = {}
        self._idle: dict[int, list[int]] = {}
        # Finalisers run at any time, in any thread: they only note what to take back.
        self._returned: deque[tuple[int, int]] = deque()
        self._returned_events: deque[Event] = deque()
        self._staging: deque[_Staging] = deque()
        self._host_bytes = 0
        self._readers = 0
        self._quiet = Condition(self.lock)
        self._recorded_marks: list[Mark] | None = None

    # Buffers.

    def allocate(self, shape: tuple[int, ...], dtype: str) -> DeviceArray:
        """An uninitialised buffer, its address a multiple of 256. Raises RunError where memory does not suffice."""
        size = max(-(-math.prod(shape) * ITEM_BYTES[dtype] // _GRAIN), 1) * _GRAIN
        with self.lock:
            self.check_open()
            address = self._take(size)
        owner = _Owner()
        weakref.finalize(owner, self._returned.append, (size, address)).atexit = False
        return DeviceArray(shape, dtype, address, owner)

    def zeros(self, shape: tuple[int, ...], dtype: str) -> DeviceArray:
        """A buffer of zeros."""
        array = self.allocate(shape, dtype)
        self.write(array, np.zeros(shape, host_dtype(dtype)))
        return array

    def write(self, array: DeviceArray, values: NDArray[Any]) -> None:
        """Copy an array of the same shape and dtype to the device. `values` may change as soon as this returns."""
        self._check(array, values.shape, values.dtype)
        size = array.nbytes
        if not size:
            return
        with self.lock:
            self.check_open()
            assert self._recorded_marks is None, "a replay would copy whatever is in the host's block by then"
            staging = self._stage(size)
            # The bytes as they are: numpy has no bfloat16, which travels as uint16.
            target = staging.host[:size].view(values.dtype).reshape(values.shape)
            np.copyto(target, values, casting="no")
            self.device.to_device(array.address, staging.host, size)
            self.device.record(staging.event)
            self._staging.append(staging)

    def read(self, array: DeviceArray) -> NDArray[Any]:
        """A copy of a buffer, when all work before this call is done; bfloat16 comes as uint16."""
        size = array.nbytes
        values: NDArray[Any] = np.empty(array.shape, host_dtype(array.dtype))
        if not size:
            return values
        with self.lock:
            self.check_open()
            staging = self._stage(size)
            self.device.to_host(staging.host, array.address, size)
            self.device.record(staging.event)
            self._readers += 1
        try:
            self.device.wait(staging.event)
            np.copyto(values, staging.host[:size].view(values.dtype).reshape(values.shape))
        finally:
            with self.lock:
                self._staging.append(staging)
                self._readers -= 1
                self._quiet.notify_all()
        return values

    def copy(self, source: DeviceArray, target: DeviceArray) -> None:
        """Copy a whole buffer to another of its shape and dtype."""
        self._check(target, source.shape, source.dtype)
        with self.lock:
            self.check_open()
            if source.nbytes:
                self.device.on_device(target.address, source.address, source.nbytes)

    def copy_rows(self, source: DeviceArray, target: DeviceArray, rows: Sequence[int] | None = None) -> None:
        """Copy [N, R, …] to [N, B, …], B of the R rows of each of the N entries; neighbours as one piece of work."""
        (N, B), R = target.shape[:2], source.shape[1]
        self._check(target, (source.shape[0], min(B, R), *source.shape[2:]), source.dtype)
        with self.lock:
            self.check_open()
            if not target.nbytes:
                return
            row = target.nbytes // (N * B)
            for to, first, count in _runs(range(B) if rows is None else rows):
                place, given = target.address + to * row, source.address + first * row
                self.device.on_device_spaced(place, given, count * row, R * row, N, B * row)

    # Time.

    def mark(self) -> Mark:
        """Here and now on the stream."""
        with self.lock:
            self.check_open()
            if self._returned_events:
                event = self._returned_events.popleft()
            else:
                event = self.device.event()
            mark = Mark(event)
            weakref.finalize(mark, self._returned_events.append, event).atexit = False
            if self._recorded_marks is None:
                self.device.record(event)
            else:
                self.device.record_in_graph(event)
                self._recorded_marks.append(mark)
            return mark

    def seconds(self, begin: Mark, end: Mark) -> float:
        """Time between two marks; waits for the later one. Within recorded work: in its latest replay."""
        with self._reader():
            self.device.wait((end.replayed or end).event)
            return self.device.elapsed(begin.event, end.event)

    # Recordings.

    def record(self, work: Callable[[], T]) -> tuple[T, Recording]:
        """Call `work` and record what it puts on the stream: copies on the device, kernels and marks, nothing else.

        CudaError where something can't be recorded; the stream is usable either way.
        """
        with self.lock:
            self.check_open()
            self.device.begin_capture()
            marks: list[Mark] = []
            self._recorded_marks = marks
            try:
                result = work()
            except BaseException:
                with suppress(CudaError):
                    self.device.free_graph(self.device.end_capture())
                raise
            finally:
                self._recorded_marks = None
            return result, Recording(self.device.end_capture(), marks)

    @property
    def recording(self) -> bool:
        """Whether work is being recorded. Asked with the lock held."""
        return self._recorded_marks is not None

    def replay(self, recording: Recording) -> None:
        """Put what was recorded on the stream."""
        with self.lock:
            self.check_open()
            self.device.launch(recording.graph)
            if recording.marks:
                behind = self.mark()
                for mark in recording.marks:
                    mark.replayed = behind

    # The end.

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def check_open(self) -> None:
        """Raise RunError once `close` was called."""
        if self._closed:
            raise RunError("the plan was closed while it was in use; keep it open until all calls return")

    def close(self) -> None:
        """Wait for the stream and give everything back, also what somebody still holds. Twice does nothing."""
        with self.lock:
            if self._closed:
                return
            self._closed = True
            while self._readers:
                self._quiet.wait()
            # After a fault of the device every call fails, and its memory is gone with the process.
            with suppress(CudaError):
                self.device.synchronize()
                for address in self._addresses:
                    self.device.free(address)
                for staging in self._staging:
                    self.device.free_host(staging.host)
                    self.device.free_event(staging.event)
                while self._returned_events:
                    self.device.free_event(self._returned_events.popleft())
            self._addresses, self._idle, self.used, self._host_bytes = {}, {}, 0, 0
            self._staging.clear()

    @contextmanager
    def _reader(self) -> Iterator[None]:
        """Somebody waits for the device without the lock; `close` lets them finish."""
        with self.lock:
            self.check_open()
            self._readers += 1
        try:
            yield
        finally:
            with self.lock:
                self._readers -= 1
                self._quiet.notify_all()

    def _take(self, size: int) -> int:
        """Memory of exactly this size: the lowest address given back, else new.

        The lowest, so that a set of buffers that is given up and made again gets the addresses that it had, and what
        was recorded on them can be launched again.
        """
        while self._returned:
            returned_size, address = self._returned.popleft()
            if address in self._addresses:
                heapq.heappush(self._idle.setdefault(returned_size, []), address)
        idle = self._idle.get(size)
        if idle:
            return heapq.heappop(idle)
        try:
            address = self.device.malloc(size)
        except CudaError as error:
            if not error.out_of_memory or not self._trim():
                raise
            address = self.device.malloc(size)
        self._addresses[address] = size
        self.used += size
        return address

    def _trim(self) -> int:
        """Give memory that nobody uses back to the device; how many bytes."""
        self.device.synchronize()
        trimmed = 0
        for size, addresses in self._idle.items():
            for address in addresses:
                self.device.free(address)
                del self._addresses[address]
                trimmed += size
        self._idle.clear()
        self.used -= trimmed
        return trimmed

    def _stage(self, size: int) -> _Staging:
        """A page-locked block of at least `size` bytes that no pending copy uses."""
        for i, staging in enumerate(self._staging):
            if size <= len(staging.host) <= max(4 * size, _SMALLEST_BLOCK) and self.device.done(staging.event):
                del self._staging[i]
                return staging
        wanted = max(1 << (size - 1).bit_length(), _SMALLEST_BLOCK)
        while self._staging and self._host_bytes + wanted > _HOST_LIMIT:
            oldest = self._staging.popleft()
            self.device.wait(oldest.event)
            if len(oldest.host) >= size:
                return oldest
            self._host_bytes -= len(oldest.host)
            self.device.free_host(oldest.host)
            self.device.free_event(oldest.event)
        self._host_bytes += wanted
        return _Staging(self.device.malloc_host(wanted), self.device.event())

    def _check(self, array: DeviceArray, shape: tuple[int, ...], dtype: Any) -> None:
        wanted = array.dtype if isinstance(dtype, str) else host_dtype(array.dtype)
        if array.shape != tuple(shape) or wanted != dtype:
            raise RunError(
                f"cannot copy {dtype} {list(shape)} to a buffer of {array.dtype} {list(array.shape)}; "
                "give the same shape and dtype"
            )


def _runs(rows: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Neighbours among ascending rows: (place of the first, its number, how many)."""
    at = 0
    while at < len(rows):
        count = 1
        while at + count < len(rows) and rows[at + count] == rows[at] + count:
            count += 1
        yield at, rows[at], count
        at += count


def host_dtype(dtype: str) -> np.dtype[Any]:
    """How a device dtype looks in numpy."""
    return np.dtype("uint16" if dtype == "bfloat16" else dtype)


def device_array(buffer: Buffer) -> DeviceArray:
    """The buffer, known to be a DeviceArray."""
    assert isinstance(buffer, DeviceArray), type(buffer)
    return buffer


class CudaBuffers:
    """The part of a backend that handles buffers, for engines that work in a GPU's memory."""

    max_mixed: int | None = None
    cache_dtype: str | None = None
    _memory: Memory

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        """An uninitialised buffer on the GPU; `dtype` may be "bfloat16"."""
        return self._memory.allocate(shape, dtype)

    def constant(self, values: NDArray[Any], dtype: str) -> Buffer:
        """A copy of the array on the GPU."""
        buffer = self._memory.allocate(values.shape, dtype)
        self._memory.write(buffer, values)
        return buffer

    def write(self, buffer: Buffer, values: NDArray[Any]) -> None:
        """Copy an array to the GPU."""
        self._memory.write(device_array(buffer), values)

    def read(self, buffer: Buffer) -> NDArray[Any]:
        """A copy of a buffer, when all work before it is done."""
        return self._memory.read(device_array(buffer))

    def copy(self, source: Buffer, target: Buffer) -> None:
        """Copy within the GPU's memory."""
        self._memory.copy(device_array(source), device_array(target))

    def copy_rows(self, source: Buffer, target: Buffer, rows: Sequence[int] | None = None) -> None:
        """Copy some rows of each entry, within the GPU's memory."""
        self._memory.copy_rows(device_array(source), device_array(target), rows)

    def repeated(self, owner: object, key: Hashable, work: Callable[[], T]) -> T:
        """Nothing is recorded."""
        return work()

    def mark(self) -> Mark:
        """A CUDA event."""
        return self._memory.mark()

    def seconds(self, begin: Mark, end: Mark) -> float:
        """Time between two events on the GPU."""
        return self._memory.seconds(begin, end)
