"""Prometheus metrics for `/metrics`: each replica collects its own, the HTTP front merges them."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import Metric
from ray import serve

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
PROBABILITIES = tuple(n / 10 for n in range(1, 11))
SIZES = (1, 2, 4, 8, 16, 32, 64)

COUNTERS = {
    "addressvlm_requests": ("Requests answered.", ("method", "route", "status")),
    "addressvlm_localized": ("Photos localized; known is false where the answer was don't know.", ("city", "known")),
    "addressvlm_tokens": ("Tokens read and written in chats.", ("kind",)),
}
HISTOGRAMS = {
    "addressvlm_request_seconds": ("From request to the last byte of its answer.", ("route",), SECONDS),
    "addressvlm_confidence": ("Confidence of localized photos.", ("city",), PROBABILITIES),
    "addressvlm_decode_seconds": ("Decoding of one image, waiting for its turn included.", (), SECONDS),
    "addressvlm_batch_size": ("Requests that went through the model together.", ("kind",), SIZES),
    "addressvlm_model_seconds": ("Time of one batch in the model.", ("kind",), SECONDS),
}


class ServiceMetrics:
    """The metrics of one replica."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.metrics: dict[str, Any] = {
            name: Counter(name, text, labels, registry=self.registry) for name, (text, labels) in COUNTERS.items()
        }
        for name, (text, labels, buckets) in HISTOGRAMS.items():
            self.metrics[name] = Histogram(name, text, labels, buckets=buckets, registry=self.registry)

    def count(self, name: str, *labels: str, by: float = 1) -> None:
        """Add to a counter."""
        metric = self.metrics[name]
        (metric.labels(*labels) if labels else metric).inc(by)

    def observe(self, name: str, value: float, *labels: str) -> None:
        """Add to a histogram."""
        metric = self.metrics[name]
        (metric.labels(*labels) if labels else metric).observe(value)

    @contextmanager
    def time(self, name: str, *labels: str) -> Iterator[None]:
        """Add the seconds that the block takes to a histogram."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.observe(name, time.perf_counter() - start, *labels)

    def collect(self) -> list[Metric]:
        """The current values, without metrics that are zero."""
        return [metric for metric in self.registry.collect() if any(s.value for s in metric.samples if "created" not in s.name)]


class MetricsReplica:
    """A deployment class with `metrics: ServiceMetrics`."""

    metrics: ServiceMetrics

    async def collect(self) -> tuple[str, list[Metric]]:
        """This replica's name and metrics."""
        return str(serve.get_replica_context().replica_tag), self.metrics.collect()


def render_metrics(replicas: Mapping[str, Sequence[Metric]]) -> bytes:
    """Prometheus text of all replicas' metrics, with the label `replica`."""
    families: dict[str, Metric] = {}
    for replica, metrics in replicas.items():
        for metric in metrics:
            family = families.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
            for sample in metric.samples:
                if not sample.name.endswith("_created"):
                    family.add_sample(sample.name, {**sample.labels, "replica": replica}, sample.value)

    class MergedCollector:
        def collect(self) -> Iterable[Any]:
            return families.values()

    registry = CollectorRegistry()
    registry.register(MergedCollector())
    return generate_latest(registry)
