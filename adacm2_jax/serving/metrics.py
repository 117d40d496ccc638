"""What ``/metrics`` tells, in Prometheus's format."""

from collections.abc import Callable
from typing import Any

import prometheus_client as prometheus

_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


class Metrics:
    """The counters of one server."""

    def __init__(self) -> None:
        self._registry = prometheus.CollectorRegistry()
        made: dict[str, Any] = {"registry": self._registry, "namespace": "adacm2"}
        self._requests = prometheus.Counter(
            "requests", "Answered requests, by path and status", ("path", "status"), **made
        )
        self._counts = {
            "frames": prometheus.Counter("frames", "Frames read, of all sessions", **made),
            "tokens": prometheus.Counter("tokens", "Tokens written", **made),
        }
        self._distributions = {
            "first_token_seconds": prometheus.Histogram(
                "first_token_seconds",
                "From a question's arrival at the engine to its first token",
                buckets=_SECONDS,
                **made,
            ),
            "frame_seconds": prometheus.Histogram(
                "frame_seconds", "Seconds of a pass a frame in it", buckets=_SECONDS, **made
            ),
            "rows": prometheus.Histogram(
                "rows",
                "Sessions that were read in one pass",
                buckets=(1, 2, 4, 8, 16, 32, 64),
                **made,
            ),
        }
        self._made = made

    def watch(self, name: str, value: float) -> None:
        """Something happened; the engine's thread calls this."""
        if name in self._counts:
            self._counts[name].inc(value)
        else:
            self._distributions[name].observe(value)

    def show(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Adds a gauge that is read when somebody looks."""
        prometheus.Gauge(name, text, **self._made).set_function(value)

    def request(self, path: str, status: int) -> None:
        """A request was answered; ``path`` is the route, not what was asked for."""
        self._requests.labels(path, str(status)).inc()

    def text(self) -> tuple[bytes, str]:
        """All of them, and their content type."""
        content: Any = prometheus.generate_latest(self._registry)
        return content, prometheus.CONTENT_TYPE_LATEST
