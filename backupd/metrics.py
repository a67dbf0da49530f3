"""What Prometheus reads: the text of `/metrics`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prometheus_client import Metric

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True, slots=True)
class Gauge:
    """One figure, of each source that has it; None is left out: nothing is known, which is not 0."""

    name: str
    """With `backupd_` before it, and its unit at its end."""
    about: str
    values: Mapping[str, float | None]


def exposition(gauges: Iterable[Gauge]) -> bytes:
    """In Prometheus' text format."""
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.registry import Collector

    class Given(Collector):
        def collect(self) -> Iterator[Metric]:
            return map(_family, gauges)

    registry = CollectorRegistry()
    registry.register(Given())
    return generate_latest(registry)


def _family(gauge: Gauge) -> Metric:
    from prometheus_client.core import GaugeMetricFamily

    family = GaugeMetricFamily(gauge.name, gauge.about, labels=["source"])
    for source, value in gauge.values.items():
        if value is not None:
            family.add_metric([source], value)
    return family
