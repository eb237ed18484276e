"""A histogram for one thread: an observation costs a bisection, whatever its weight."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

# Seconds. The bounds that dashboards for other servers were drawn for.
FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
               80.0, 160.0, 640.0, 2560.0)  # fmt: skip
TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75,
         1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0)  # fmt: skip
REQUEST = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0,
           50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0)  # fmt: skip


class Histogram:
    """Counts of values up to each of `bounds` (ascending), and their sum."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, weight: int = 1) -> None:
        """Count a value `weight` times; one below 0 (two clocks' difference) as 0."""
        value = max(value, 0.0)
        self._counts[bisect_left(self._bounds, value)] += weight
        self._sum += value * weight

    @property
    def count(self) -> int:
        """Observations."""
        return sum(self._counts)

    @property
    def total(self) -> float:
        """Sum of all values."""
        return self._sum

    def buckets(self) -> list[tuple[str, float]]:
        """Upper bounds as Prometheus writes them, each with the number of values up to it."""
        found, seen = [], 0
        for bound, count in zip((*self._bounds, None), self._counts, strict=True):
            seen += count
            found.append(("+Inf" if bound is None else repr(float(bound)), float(seen)))
        return found
