"""What runs the graphs: the protocols of a buffer and of a backend."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from numpy.typing import NDArray


class Buffer(Protocol):
    """Contiguous memory where the engine works: a numpy array on a CPU, a device pointer with a shape on a GPU."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the dimensions."""
        ...

    def __getitem__(self, rows: slice, /) -> Buffer:
        """A view of some rows of the first dimension, without copying."""
        ...

    def reshape(self, shape: tuple[int, ...], /) -> Buffer:
        """A view of the same elements in another shape, without copying."""
        ...


Mark = Any
"""A point in an engine's stream of work: a time on a CPU, an event on a GPU."""
T = TypeVar("T")


class Backend(Protocol):
    """An opened plan on one engine. `run` may be called from several threads at once, on different buffers.

    A GPU works behind the caller's back: what is run, written and copied is done in that order, and only `read` and
    `seconds` wait for it.
    """

    name: str
    batches: tuple[int, ...]
    """How many images a step can make at once, ascending, from 1."""
    guided_only: bool
    """Whether steps always have 2B rows. A request without guidance then runs with cfg 0, for the same image."""
    max_mixed: int | None
    """Control branches that a step can mix; None: any number."""
    cache_dtype: str | None
    """What this backend keeps K and V in; None: what the plan's graphs have."""

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        """An uninitialised buffer; `dtype` is a numpy name."""
        ...

    def constant(self, values: NDArray[Any], dtype: str) -> Buffer:
        """A buffer of these values, which nobody writes to: on a CPU the array itself, mapped where it is."""
        ...

    def write(self, buffer: Buffer, values: NDArray[Any]) -> None:
        """Fill a whole buffer from an array of its shape and dtype."""
        ...

    def read(self, buffer: Buffer) -> NDArray[Any]:
        """A copy of a buffer as an array, when all work on it is done."""
        ...

    def copy(self, source: Buffer, target: Buffer) -> None:
        """Copy a whole buffer to another of its shape and dtype, where the engine works."""
        ...

    def copy_rows(self, source: Buffer, target: Buffer, rows: Sequence[int] | None = None) -> None:
        """Copy [N, R, …] to [N, B, …], other memory: B of the R rows of each of the N entries, by default the first.

        rows: B row numbers, ascending.
        """
        ...

    def mark(self) -> Mark:
        """Now, in the order of the engine's work."""
        ...

    def seconds(self, begin: Mark, end: Mark) -> float:
        """Time from one mark to another; waits for `end`."""
        ...

    def step_graph(self, scale: int, batch: int) -> str:
        """Which graph makes this scale for so many images: the one with named dimensions, or a static form."""
        ...

    def run(self, graph: str, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        """Run a graph of the plan, writing its outputs in place. Raises RunError.

        Inputs that the graph does not have are left out, so that one loop feeds both forms of the step; outputs that
        nobody asks for are not given.
        """
        ...

    def repeated(self, owner: object, key: Hashable, work: Callable[[], T]) -> T:
        """What `work` returns when it was done: runs, copies and marks alone, the same for the same owner and key.

        A backend may record them, and later put the recording on its stream in place of calling `work`, with the same
        result. A recording is let go with its owner.
        """
        ...

    def report(self) -> dict[str, Any]:
        """Facts for people: engine and version, memory in bytes, and what else the backend reports."""
        ...

    def close(self) -> None:
        """Let go of engines and memory. Closing twice does nothing."""
        ...
