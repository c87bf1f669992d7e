"""Counters and histograms that are filled while the server runs.

Thread-safe. prometheus_client writes them; its own histogram takes one value at a time, under a lock and
in a loop over all buckets, which is too much for every token of every stream.
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from threading import Lock

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric

__all__ = ["Counter", "Histogram"]


class Counter:
    """A number that only grows, for each set of label values."""

    def __init__(self, name: str, documentation: str, labels: Sequence[str] = ()) -> None:
        self._name = name
        self._documentation = documentation
        self._labels = tuple(labels)
        self._lock = Lock()
        self._values: dict[tuple[str, ...], float] = {}
        if not labels:
            self.begin()

    def begin(self, *labels: str) -> None:
        """Show a set of label values at 0, so that its first increase can be seen as one."""
        self.add(0, *labels)

    def add(self, amount: float, *labels: str) -> None:
        """Count `amount`, 0 or more; one value for each label, in their order."""
        assert amount >= 0
        assert len(labels) == len(self._labels)
        with self._lock:
            self._values[labels] = self._values.get(labels, 0) + amount

    def collect(self) -> Metric:
        """All values as of now."""
        family = CounterMetricFamily(self._name, self._documentation, labels=self._labels)
        with self._lock:
            values = dict(self._values)
        for labels, value in values.items():
            family.add_metric(labels, value)
        return family


class _Series:
    """One histogram: for each bound the values at or below it, and all of them."""

    __slots__ = ("counts", "num_values", "total")

    def __init__(self, num_bounds: int) -> None:
        self.counts = [0] * num_bounds
        self.num_values = 0
        self.total = 0.0


class Histogram:
    """How values are spread, by upper bounds in ascending order, for each set of label values."""

    def __init__(
        self, name: str, documentation: str, bounds: Sequence[float], labels: Sequence[str] = ()
    ) -> None:
        assert list(bounds) == sorted(set(bounds))
        self._name = name
        self._documentation = documentation
        self._bounds = tuple(bounds)
        self._labels = tuple(labels)
        self._lock = Lock()
        self._series: dict[tuple[str, ...], _Series] = {}
        if not labels:
            self.begin()

    def begin(self, *labels: str) -> None:
        """Show a set of label values before its first value comes."""
        self.observe((), *labels)

    def observe(self, values: Iterable[float], *labels: str) -> None:
        """Enter values, one for each label in their order."""
        assert len(labels) == len(self._labels)
        ordered = sorted(values)
        below = [bisect_right(ordered, bound) for bound in self._bounds]
        with self._lock:
            series = self._series.setdefault(labels, _Series(len(self._bounds)))
            series.counts = [old + new for old, new in zip(series.counts, below, strict=True)]
            series.num_values += len(ordered)
            series.total += sum(ordered)

    def collect(self) -> Metric:
        """All buckets as of now."""
        family = HistogramMetricFamily(self._name, self._documentation, labels=self._labels)
        names = [str(float(bound)) for bound in self._bounds]
        with self._lock:
            for labels, series in self._series.items():
                buckets = [*zip(names, series.counts, strict=True), ("+Inf", series.num_values)]
                family.add_metric(labels, buckets, series.total)
        return family
