"""What Prometheus reads of one server."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """All series of a server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("car_requests", "HTTP requests", ["route", "status"], registry=self.registry)
        self.queue_depth = Gauge("car_queue_depth", "Requests that wait", ["plan"], registry=self.registry)
        self.in_flight = Gauge("car_in_flight", "Requests that wait or run", ["plan"], registry=self.registry)
        self.batch_size = Histogram(
            "car_batch_images", "Images of a batch", ["plan"], buckets=(1, 2, 4, 8, 16, 32), registry=self.registry
        )
        self.first_preview = self._seconds("car_first_preview_seconds", "From arrival to the first scale")
        self.image_seconds = self._seconds("car_image_seconds", "From arrival to the finished images")
        self.images = Counter("car_images", "Images that were finished", ["plan"], registry=self.registry)
        self.cancelled = Counter("car_cancelled", "Requests that were cancelled", ["plan"], registry=self.registry)
        self.failed = Counter("car_failed", "Requests that the engine failed on", ["plan"], registry=self.registry)
        self.rejected = Counter("car_rejected", "Requests that were refused", ["reason"], registry=self.registry)

    def _seconds(self, name: str, what: str) -> Histogram:
        return Histogram(name, what, ["plan"], buckets=_SECONDS, registry=self.registry)

    def forget(self, plan: str) -> None:
        """Start counting a plan's images anew: those of the warm-up are nobody's."""
        for series in (self.batch_size, self.first_preview, self.image_seconds, self.images):
            series.remove(plan)

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)
