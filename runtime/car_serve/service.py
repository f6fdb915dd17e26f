"""What the routes share: plans with their batchers, results, limits, metrics, and whether the server drains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock

from car_runtime import Plan
from car_serve.batcher import Batcher
from car_serve.errors import ServeError
from car_serve.forms import PictureForm
from car_serve.jobs import Job, Results
from car_serve.limits import Limits
from car_serve.metrics import Metrics
from car_serve.requests import job_of


@dataclass(eq=False)
class Service:
    """One server's state. `close` ends its threads and plans."""

    plans: Sequence[Plan]
    limits: Limits = field(default_factory=Limits)
    metrics: Metrics = field(default_factory=Metrics)
    draining: bool = False
    ready: bool = False

    def __post_init__(self) -> None:
        self.results = Results(self.limits.keep_results, self.limits.keep_seconds, self.limits.keep_bytes)
        self.batchers: Mapping[str, Batcher] = {
            plan.manifest.name: Batcher(plan.manifest.name, plan, self.limits, self.metrics) for plan in self.plans
        }
        self._closing = Lock()
        self._closed = False

    def batcher(self, name: str | None) -> Batcher:
        """That of a plan, the first one's by default. Raises ServeError (404)."""
        if name is None:
            return next(iter(self.batchers.values()))
        if name not in self.batchers:
            raise ServeError(
                404, "no_plan", f"there is no plan {name[:60]!r}; choose {', '.join(self.batchers)}", param="plan"
            )
        return self.batchers[name]

    def submit(self, form: PictureForm) -> Job:
        """A job in its queue, findable by its id. Raises ServeError, UserError."""
        if self.draining:
            self.metrics.rejected.labels("draining").inc()
            raise ServeError(503, "draining", "the server is about to end; send it to another one", retry_after=5)
        batcher = self.batcher(form.plan)
        job = job_of(batcher.plan, self.results, self.limits, form)
        batcher.submit(job)
        self.results.add(job)
        return job

    @property
    def busy(self) -> bool:
        """Whether accepted requests are not done yet."""
        return any(batcher.depth for batcher in self.batchers.values())

    def close(self) -> None:
        """End the engine threads, then the plans. Blocks for at most a scale of each plan."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
            self.draining = True
            for batcher in self.batchers.values():
                batcher.close()
            for plan in self.plans:
                plan.close()
