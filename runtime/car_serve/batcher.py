"""One engine thread, a bounded queue, batches of requests that fit; one for each plan.

An image depends on its own request, never on what shares its batch. Whether a job was cancelled is looked at between
scales. When a batch fails, its jobs are drawn once more one by one, so that only the one at fault ends in an error.

A second thread decodes previews: they cost as much as the scales themselves (16 of 70 ms an image of the
64×64 plan, times its six scales), and the engine goes on meanwhile. Only the first preview of a batch holds it up, so
that this one is there at once, and the last scale waits for the previews before it, so that they never pile up. Where
nobody wants previews, all is done on the engine's thread.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import accumulate
from threading import Condition, Thread
from time import monotonic

from car_runtime import Plan, ScaleResult
from car_serve.errors import ServeError, served
from car_serve.jobs import Job, ScaleEvent
from car_serve.limits import Limits
from car_serve.metrics import Metrics

log = logging.getLogger("car_serve")


class Batcher:
    """Draws the jobs of one plan in the order in which they came."""

    def __init__(self, name: str, plan: Plan, limits: Limits, metrics: Metrics) -> None:
        self.name = name
        self.plan = plan
        self._limits = limits
        self._metrics = metrics
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._wake = Condition()
        self._closed = False
        self._pace = 0.1
        """Seconds per request, a moving average: what `Retry-After` is made of."""
        self._crowded = False
        """Whether several requests were there lately: only then the first of a batch waits for others."""
        self._decoder = ThreadPoolExecutor(1, f"decoder {name}")
        metrics.queue_depth.labels(name).set_function(lambda: len(self._waiting))
        metrics.in_flight.labels(name).set_function(lambda: self.depth)
        self._thread = Thread(target=self._run, name=f"engine {name}", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the engine thread runs."""
        return self._thread.is_alive()

    @property
    def depth(self) -> int:
        """Requests that wait or run."""
        return len(self._waiting) + len(self._running)

    def submit(self, job: Job) -> None:
        """Queue a job. Raises ServeError: 429 where the queue is full, 503 where the server is about to end."""
        with self._wake:
            if self._closed or not self.alive:
                raise ServeError(503, "closing", "the server is about to end; send it to another one", retry_after=5)
            waiting = sum(not job.cancelled for job in self._waiting)
            if waiting >= self._limits.queue:
                self._metrics.rejected.labels("queue_full").inc()
                raise ServeError(
                    429,
                    "queue_full",
                    f"{waiting} requests are waiting already; send it again later",
                    retry_after=self._pace * waiting,
                )
            job.place = waiting + len(self._running)
            self._waiting.append(job)
            self._wake.notify_all()

    def close(self) -> None:
        """End the thread; jobs that wait or run end as errors. Blocks until the scale that runs is done."""
        with self._wake:
            self._closed = True
            for job in (*self._waiting, *self._running):
                job.cancel()
            self._wake.notify_all()
        self._thread.join()
        self._decoder.shutdown()

    def _run(self) -> None:
        while batch := self._next_batch():
            began = monotonic()
            try:
                self._draw(batch)
            finally:
                self._running = []
            self._pace += 0.2 * ((monotonic() - began) / len(batch) - self._pace)

    def _next_batch(self) -> list[Job]:
        """The next jobs to draw together; empty once the batcher is closed and nothing waits."""
        with self._wake:
            while not self._closed and not self._waiting:
                self._wake.wait()
            self._wait_for_company()
            batch: list[Job] = []
            images = 0
            while self._waiting:
                job = self._waiting[0]
                if batch and (images + len(job.images) > self._limits.max_batch or not _fit(batch[0], job)):
                    break
                batch.append(self._waiting.popleft())
                images += 0 if job.cancelled else len(job.images)
            self._running = batch  # in the same breath, so that a server that drains sees them
            self._crowded = sum(not job.cancelled for job in (*batch, *self._waiting)) > 1
            return batch

    def _wait_for_company(self) -> None:
        """Give others `batch_wait_ms` from when the first job came, unless the last one was alone, too."""
        while self._crowded and not self._closed and 0 < self._images() < self._limits.max_batch:
            left = self._waiting[0].arrived + self._limits.batch_wait_ms / 1000 - monotonic()
            if left <= 0 or not self._wake.wait(left):
                break

    def _images(self) -> int:
        return sum(len(job.images) for job in self._waiting if not job.cancelled)

    def _draw(self, jobs: Sequence[Job]) -> None:
        wanted = [job for job in jobs if not self._is_over(job)]
        if not wanted:
            return
        self._metrics.batch_size.labels(self.name).observe(sum(len(job.images) for job in wanted))
        for job in wanted:
            job.began()
        shown: list[Future[None]] = []
        previewed = any(job.previews for job in wanted)
        try:
            try:
                requests = [job.request for job in wanted]
                for scale in self.plan.stream_many(requests, cancelled=lambda i: wanted[i].cancelled):
                    if previewed and not scale.last:
                        shown.append(self._decoder.submit(self._take, wanted, scale))
                        if scale.index == 0 and any(0 in job.previews for job in wanted):
                            shown[-1].result()
                        continue
                    while shown:
                        shown.pop(0).result()
                    self._take(wanted, scale)
            finally:
                wait(shown)
        except Exception as error:
            log.exception("plan %s: a batch of %d failed", self.name, len(wanted))
            left = [job for job in wanted if not job.finished]
            for job in left:
                if len(wanted) == 1:
                    self._metrics.failed.labels(self.name).inc()
                    job.end("failed", served(error))
                else:
                    self._draw([job])
            return
        for job in wanted:
            if not self._is_over(job):  # every image has come by now
                raise AssertionError(f"job {job.id} was left behind")

    def _take(self, jobs: Sequence[Job], scale: ScaleResult) -> None:
        """Decode a scale as far as it is wanted, and hand it to its jobs."""
        taking = [jobs[request] for request in scale.requests]
        shown_rows = [
            row for row, job in enumerate(taking) if job.awaits and (scale.last or scale.index in job.previews)
        ]
        previews = dict(zip(shown_rows, scale.preview(shown_rows), strict=True)) if shown_rows else {}
        place = self.plan.manifest.scales[scale.index]
        firsts = list(accumulate((len(job.images) for job in jobs), initial=0))
        for row, (image, request) in enumerate(zip(scale.images, scale.requests, strict=True)):
            job, own = jobs[request], image - firsts[request]
            if not job.awaits:
                continue
            job.tokens[own, place.start : place.stop] = scale.tokens[row].reshape(-1)
            shown = previews.get(row)
            if scale.last and shown is not None and job.request.edit is not None:
                shown = job.request.edit.finished(shown)
            first = not job.scales
            event = ScaleEvent(image=own, index=scale.index, last=scale.last, pixels=shown, seconds=scale.seconds)
            if scale.index == 0 and 0 in job.previews:
                _ = event.webp  # while the engine waits, so that nothing holds it up afterwards
            job.drew(event)
            if first:
                self._metrics.first_preview.labels(self.name).observe(job.timings["first_preview"])
            if all(done is not None for done in job.images):
                job.end("done")
                self._metrics.images.labels(self.name).inc(len(job.images))
                self._metrics.image_seconds.labels(self.name).observe(job.timings["total"])

    def _is_over(self, job: Job) -> bool:
        """Whether a job has ended, which a cancelled one does here."""
        if not job.finished and job.cancelled:
            self._metrics.cancelled.labels(self.name).inc()
            why = "the server ended" if self._closed else "the request was cancelled"
            job.end("cancelled", ServeError(503 if self._closed else 499, "cancelled", f"{why}; send it again"))
        return job.finished


def _fit(first: Job, other: Job) -> bool:
    """Whether two jobs may share steps: the same scales are drawn, and the same branches followed."""
    a, b = first.request, other.request
    branches = [tuple(control.branch for control in request.controls) for request in (a, b)]
    return a.schedule.drawn == b.schedule.drawn and branches[0] == branches[1]
