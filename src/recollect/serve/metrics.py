"""What ``/metrics`` counts, in a registry of its own: two services in one process do not add up."""

from collections.abc import Callable

from recollect.errors import MissingExtraError

try:
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
except ImportError as error:
    raise MissingExtraError("recollect serve needs prometheus-client: pip install 'recollect[serve]'.") from error

TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counters of one service.

    Args:
        entries: Returns how many entries the memory has.
        capacity: How many it can have.
    """

    def __init__(self, *, entries: Callable[[], int], capacity: int) -> None:
        own = self._registry = CollectorRegistry()
        self._requests = Counter("recollect_requests", "Requests answered.", ("endpoint", "status"), registry=own)
        self._seconds = Histogram(
            "recollect_request_seconds", "Time to the answer.", ("endpoint",), buckets=_SECONDS, registry=own
        )
        self._batches = Histogram(
            "recollect_batch_inputs", "Inputs predicted in one batch.", buckets=_SIZES, registry=own
        )
        self.observed = Counter("recollect_observed", "Entries written to the memory.", registry=own)
        self.forgotten = Counter("recollect_forgotten", "Entries forgotten on request.", registry=own)
        Gauge("recollect_memory_entries", "Entries in the memory.", registry=own).set_function(entries)
        Gauge("recollect_memory_capacity", "Entries that it can hold.", registry=own).set(capacity)
        ProcessCollector(registry=self._registry)

    def waiting(self, count: Callable[[], int]) -> None:
        """Shows how many inputs wait."""
        Gauge("recollect_waiting_inputs", "Inputs that wait for the model.", registry=self._registry).set_function(
            count
        )

    def answered(self, endpoint: str, status: int, seconds: float) -> None:
        """Counts an answer."""
        self._requests.labels(endpoint, str(status)).inc()
        self._seconds.labels(endpoint).observe(seconds)

    def batch(self, size: int) -> None:
        """Counts a batch."""
        self._batches.observe(size)

    def text(self) -> bytes:
        """Returns all of it in Prometheus' format."""
        return generate_latest(self._registry)
