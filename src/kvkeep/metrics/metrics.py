"""Metrics of one server: filled by its requests, written out as text for Prometheus."""

from collections.abc import Iterable

from prometheus_client.core import InfoMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from kvkeep.metrics.base import Snapshot
from kvkeep.metrics.counts import snapshot_families
from kvkeep.metrics.requests import RequestCounters
from kvkeep.metrics.vllm import vllm_families

__all__ = ["COMPAT_NAMES", "MEDIA_TYPE", "Metrics"]

# What else than our own names there is.
COMPAT_NAMES = ("vllm",)
# Every scraper reads it. OpenMetrics would add nothing, and its writer does not keep ":" in names.
MEDIA_TYPE = CONTENT_TYPE_PLAIN_0_0_4


class Metrics:
    """Everything a scrape shows; `requests` counts what has happened, the rest is looked up.

    `model` is the name it is served by. With `compat` there are also the names that other engines use.
    """

    def __init__(self, *, model: str, version: str, compat: str | None = None) -> None:
        assert compat is None or compat in COMPAT_NAMES
        self.requests = RequestCounters()
        self._model = model
        self._version = version
        self._compat = compat

    def render(self, snapshot: Snapshot) -> bytes:
        """All families as text, of the type MEDIA_TYPE."""
        facts = {"model": self._model, **snapshot.facts}
        families = [
            InfoMetricFamily("kvkeep_build", "The program.", {"version": self._version}),
            InfoMetricFamily("kvkeep_cache", "The cache.", facts),
            *self.requests.collect(),
            *snapshot_families(snapshot),
        ]
        if self._compat == "vllm":
            families += vllm_families(families, self._model)
        return generate_latest(_Families(families))


class _Families:
    """What prometheus_client takes for a registry."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families
