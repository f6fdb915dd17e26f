"""What the routes share: plans with their batchers, results, limits, metrics, and whether the server drains."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock
from time import monotonic, sleep
from typing import TYPE_CHECKING

from car_runtime import Plan
from car_serve.batcher import Batcher
from car_serve.errors import ServeError
from car_serve.forms import PictureForm
from car_serve.jobs import Job, Results
from car_serve.limits import Limits
from car_serve.metrics import Metrics
from car_serve.requests import job_of

if TYPE_CHECKING:
    from car_runtime.format.manifest import Manifest


@dataclass(eq=False)
class Service:
    """One server's state. `close` ends its threads and plans."""

    plans: Sequence[Plan]
    """Those that are open from the start, the default first."""
    limits: Limits = field(default_factory=Limits)
    metrics: Metrics = field(default_factory=Metrics)
    shelf: Mapping[str, Manifest] = field(default_factory=dict)
    """Plans that `opener` opens when they are asked for, the default first."""
    opener: Callable[[str], None] | None = None
    """Sees to it that a plan of the shelf is among `batchers`, by `add`; blocks."""
    preferred: Callable[[], str | None] = lambda: None
    """The plan of a request that names none; None: the default."""
    draining: bool = False
    ready: bool = False

    def __post_init__(self) -> None:
        self.results = Results(self.limits.keep_results, self.limits.keep_seconds, self.limits.keep_bytes)
        self.batchers: dict[str, Batcher] = {}
        for plan in self.plans:
            self.add(plan)
        self._closing = Lock()
        self._closed = False

    @property
    def names(self) -> tuple[str, ...]:
        """All plans that can be asked for, the default first."""
        return tuple(self.shelf or self.batchers)

    def add(self, plan: Plan) -> Batcher:
        """Draw with one more plan."""
        name = plan.manifest.name
        self.batchers[name] = Batcher(name, plan, self.limits, self.metrics)
        return self.batchers[name]

    def remove(self, batcher: Batcher) -> None:
        """Close a plan, once its requests are done; it may be added again. Blocks; twice does nothing."""
        if self.batchers.get(batcher.name) is not batcher:
            return
        del self.batchers[batcher.name]
        until = monotonic() + self.limits.drain_seconds
        while batcher.depth and monotonic() < until:
            sleep(0.02)
        batcher.close()
        batcher.plan.close()

    def batcher(self, name: str | None) -> Batcher:
        """That of a plan, which may have to be opened: not for the event loop. Raises ServeError (404)."""
        name = name or self.preferred() or self.names[0]
        if name not in self.names:
            raise ServeError(
                404, "no_plan", f"there is no plan {name[:60]!r}; choose {', '.join(self.names)}", param="plan"
            )
        for _ in range(8):  # another request may have it closed again at once
            if self.opener is not None:
                self.opener(name)
            if (found := self.batchers.get(name)) is not None:
                return found
        raise ServeError(503, "busy", f"the plan {name!r} finds no place; send it again later", retry_after=5)

    def submit(self, form: PictureForm) -> Job:
        """A job in its queue, findable by its id. Raises ServeError, UserError."""
        if self.draining:
            self.metrics.rejected.labels("draining").inc()
            raise ServeError(503, "draining", "the server is about to end; send it to another one", retry_after=5)
        job = self._queued(form)
        self.results.add(job)
        return job

    def _queued(self, form: PictureForm) -> Job:
        for left in reversed(range(8)):
            batcher = self.batcher(form.plan)
            job = job_of(batcher.plan, self.results, self.limits, form)
            try:
                batcher.submit(job)
                return job
            except ServeError as error:
                if error.code != "closing" or self.draining or not left:  # else it was closed for another plan
                    raise
        raise AssertionError("the last turn returns or raises")

    @property
    def busy(self) -> bool:
        """Whether accepted requests are not done yet."""
        return any(batcher.depth for batcher in list(self.batchers.values()))

    def close(self) -> None:
        """End the engine threads, then the plans. Blocks for at most a scale of each plan."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
            self.draining = True
            for batcher in list(self.batchers.values()):
                batcher.close()
                batcher.plan.close()
