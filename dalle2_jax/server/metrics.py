"""The metrics of a server, in Prometheus's format."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from dalle2_jax.server.engine.queue import Step

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters of a server; it is the engine's `Monitor`."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter("dalle2_requests_total", "Requests.", ["route", "status"], registry=registry)
        self.latency = Histogram(
            "dalle2_request_seconds", "Time to an answer.", ["route"], buckets=_SECONDS, registry=registry
        )
        self.images = Counter("dalle2_images_total", "Images generated.", registry=registry)
        self._queued = Histogram(
            "dalle2_queue_seconds", "Time until a request is started.", buckets=_SECONDS, registry=registry
        )
        self._batches = Counter("dalle2_batches_total", "Batches run.", ["size"], registry=registry)
        self._rows = Counter("dalle2_batch_rows_total", "Rows of batches that were no padding.", registry=registry)
        self._slots = Counter(
            "dalle2_batch_slots_total", "Sizes of batches; rows / slots is the fill.", registry=registry
        )
        self._busy = Counter("dalle2_busy_seconds_total", "Time in which a batch runs.", registry=registry)

    def watch(self, name: str, about: str, value: Callable[[], float]) -> None:
        """Adds a gauge that is read when the metrics are."""
        Gauge(name, about, registry=self._registry).set_function(value)

    def batch(self, step: Step, count: int, size: int, seconds: float) -> None:
        """See `Monitor`."""
        if step.batched:
            self._batches.labels(str(size)).inc()
            self._rows.inc(count)
            self._slots.inc(size)
        self._busy.inc(seconds)

    def finished(self, images: int, waited: float, seconds: float) -> None:
        """See `Monitor`."""
        self._queued.observe(waited)

    def text(self) -> bytes:
        """Returns all metrics."""
        return generate_latest(self._registry)
