"""How much the server takes on: queue, batches, sizes, rate, and how long results are kept."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from time import monotonic

from car_serve.errors import ServeError

MEBI = 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Every limit of a server, with the defaults of `car-run serve`."""

    queue: int = 64
    """Requests that wait; one more is answered 429."""
    max_batch: int = 4
    """Images taken as one batch."""
    batch_wait_ms: float = 5.0
    """How long the first request of a batch waits for company."""
    max_images: int = 16
    """`n` of one request."""
    max_body: int = 32 * MEBI
    """Bytes of a request, 413 beyond."""
    max_pixels: int = 16 * MEBI
    """Pixels of an uploaded image, 413 beyond; looked at before it is decoded."""
    rate_per_minute: int = 0
    """Drawing requests a client may send in a minute; 0 is without limit."""
    keep_seconds: float = 3600.0
    """How long a result is found by its id."""
    keep_results: int = 256
    """How many results are kept at most."""
    keep_bytes: int = 512 * MEBI
    """Memory of kept results: images, previews, and what was edited."""
    write_timeout: float = 60.0
    """Seconds that a reader may let the server wait before it is dropped."""
    drain_seconds: float = 60.0
    """How long the server goes on for accepted requests after SIGTERM."""


class RateLimit:
    """A token bucket for each client, of as many clients as were seen last (4,096)."""

    CLIENTS = 4096

    def __init__(self, per_minute: int) -> None:
        self._per_minute = per_minute
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, client: str) -> None:
        """Count one request of a client. Raises ServeError (429)."""
        if self._per_minute <= 0:
            return
        now, rate = monotonic(), self._per_minute / 60
        left, seen = self._buckets.pop(client, (float(self._per_minute), now))
        left = min(float(self._per_minute), left + (now - seen) * rate)
        self._buckets[client] = (left - 1 if left >= 1 else left, now)
        if len(self._buckets) > self.CLIENTS:
            self._buckets.popitem(last=False)
        if left < 1:
            raise ServeError(
                429,
                "rate_limited",
                f"over {self._per_minute} requests a minute from one client; wait and send it again",
                retry_after=(1 - left) / rate,
            )
