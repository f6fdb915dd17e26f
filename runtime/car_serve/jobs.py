"""One accepted request from the queue to its images, and the results that are kept for a while."""

from __future__ import annotations

import asyncio
import secrets
from collections import OrderedDict
from collections.abc import AsyncIterator, Collection
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from threading import Lock
from time import monotonic
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from car_runtime import Plan
from car_runtime.request import Request
from car_serve.errors import ServeError
from car_serve.uploads import webp

State = Literal["queued", "running", "done", "failed", "cancelled"]


@dataclass(frozen=True, kw_only=True)
class ScaleEvent:
    """One image of a job after one more scale."""

    image: int
    index: int
    last: bool
    pixels: NDArray[np.uint8] | None
    """uint8 [H, W, 3]; None where nobody asked for this scale's preview."""
    seconds: float

    @cached_property
    def webp(self) -> bytes | None:
        """The pixels as WebP, encoded once."""
        return None if self.pixels is None else webp(self.pixels)


@dataclass(eq=False)
class Job:
    """A request that was accepted. The engine's thread writes it, coroutines read it.

    Events stay in it: a reader that is slow, or comes back, holds up nobody and misses nothing.
    """

    request: Request
    plan: Plan
    previews: Collection[int] = ()
    """The scales whose previews are wanted; the last one's image is decoded in any case."""
    about: dict[str, Any] = field(default_factory=dict)
    """What a receipt says beyond the request: edits."""
    id: str = field(default_factory=lambda: secrets.token_urlsafe(12))
    arrived: float = field(default_factory=monotonic)
    state: State = "queued"
    place: int = 0
    """Requests that were ahead of it when it was accepted."""
    error: ServeError | None = None
    images: list[NDArray[np.uint8] | None] = field(init=False)
    tokens: NDArray[np.int64] = field(init=False)
    """int64 [n, L], −1 where nothing was drawn."""
    timings: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.images = [None] * len(self.request.seeds)
        self.tokens = np.full(self.request.known.shape, -1, np.int64)
        self.scales: list[ScaleEvent] = []
        self.ended: float | None = None
        self._cancelled = False
        self._lock = Lock()
        self._watchers: set[tuple[asyncio.AbstractEventLoop, asyncio.Event, bool]] = set()

    @property
    def finished(self) -> bool:
        """Whether nothing more will come."""
        return self.ended is not None

    @property
    def awaits(self) -> bool:
        """Whether somebody still wants what comes."""
        return not self._cancelled and not self.finished

    @property
    def cancelled(self) -> bool:
        """Whether nobody wants it any more; the engine looks at this between scales."""
        return self._cancelled

    @property
    def bytes(self) -> int:
        """Memory of its pixels."""
        edit = self.request.edit
        given = 0 if edit is None else 4 * edit.frame.image.width * edit.frame.image.height
        shown = [*self.images, *(scale.pixels for scale in self.scales if not scale.last)]
        return given + sum(pixels.nbytes for pixels in shown if pixels is not None)

    def cancel(self) -> None:
        """Ask for the end; a job that has ended stays as it is."""
        self._cancelled = True

    def began(self) -> None:
        """The engine takes it up."""
        self.state = "running"
        self.timings["queue"] = monotonic() - self.arrived
        self._wake()

    def drew(self, event: ScaleEvent) -> None:
        """One more scale of one image."""
        if not self.scales:
            self.timings["first_preview"] = monotonic() - self.arrived
        self.scales.append(event)
        if event.last:
            self.images[event.image] = event.pixels
        self._wake()

    def end(self, state: State, error: ServeError | None = None) -> None:
        """The last thing that happens to a job."""
        self.error, self.state, self.ended = error, state, monotonic()
        self.timings["total"] = self.ended - self.arrived
        self._wake()

    def _wake(self) -> None:
        with self._lock:
            watchers = list(self._watchers)
        for loop, event, only_end in watchers:
            if only_end and not self.finished:
                continue
            with suppress(RuntimeError):  # a loop that was closed has no reader any more
                loop.call_soon_threadsafe(event.set)

    async def changes(self, *, only_end: bool = False) -> AsyncIterator[None]:
        """Yields whenever something happened, or at its end alone, at least once, until the job has ended."""
        watcher = (asyncio.get_running_loop(), asyncio.Event(), only_end)
        with self._lock:
            self._watchers.add(watcher)
        try:
            while True:
                finished = self.finished
                yield
                if finished:
                    return
                await watcher[1].wait()
                watcher[1].clear()
        finally:
            with self._lock:
                self._watchers.discard(watcher)

    async def wait(self) -> None:
        """Until it has ended."""
        async for _ in self.changes(only_end=True):
            pass


class Results:
    """Jobs by id, of the last hour, so many and so many bytes at most; one that has not ended is never dropped."""

    def __init__(self, keep: int, seconds: float, size: int) -> None:
        self._keep, self._seconds, self._size = keep, seconds, size
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._open: dict[str, Job] = {}
        """Those that had not ended when they were last looked at."""
        self._sizes: dict[str, int] = {}
        """Bytes of the others, which stay as they are."""
        self._total = 0
        self._lock = Lock()

    def add(self, job: Job) -> None:
        """Keep a job, and drop those whose time is over, and the oldest where they are too many or too large."""
        with self._lock:
            self._jobs[job.id] = self._open[job.id] = job
            for ended in [j for j in self._open.values() if j.finished]:
                del self._open[ended.id]
                self._sizes[ended.id] = ended.bytes
                self._total += ended.bytes
            now, drawing = monotonic(), sum(j.bytes for j in self._open.values())
            for id in list(self._sizes):  # as they ended
                late = now - (self._jobs[id].ended or now) > self._seconds
                if not late and len(self._jobs) <= self._keep and self._total + drawing <= self._size:
                    break
                del self._jobs[id]
                self._total -= self._sizes.pop(id)

    def find(self, id: str) -> Job:
        """The job of an id. Raises ServeError (404)."""
        with self._lock:
            job = self._jobs.get(id)
        if job is None:
            raise ServeError(
                404, "not_found", f"there is no result {id[:40]!r}, or no longer; draw it again", param="id"
            )
        return job

    def unfinished(self) -> list[Job]:
        """Those that the engine still owes something."""
        with self._lock:
            return [job for job in self._jobs.values() if not job.finished]
