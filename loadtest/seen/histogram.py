"""Latencies in log-spaced buckets: bounded memory, exact merging, percentiles within half a per cent."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

GROWTH = 1.01  # upper edge / lower edge of a bucket
SMALLEST_MS = 0.001
LARGEST_MS = 1e7  # 2.8 hours; so at most 2,314 buckets
PERCENTILE_ERROR = math.sqrt(GROWTH) - 1  # 0.0049876: a value stands at the geometric middle of its bucket

CONFIDENT_Z = 2.5758  # of a normal distribution, two-sided: 99 %
CURVE_PERCENTS = (*range(0, 100, 2), 99, 99.5, 99.9, 100)  # where a report notes a distribution that it draws


@dataclass
class LatencyHistogram:
    """Bucket i holds SMALLEST_MS * GROWTH**i <= latency < SMALLEST_MS * GROWTH**(i + 1).

    Counts add, so the histograms of two workers, or of two seconds, merge to the histogram of both without loss.
    """

    counts: dict[int, int] = field(default_factory=dict)
    sum_ms: float = 0.0
    min_ms: float = LARGEST_MS
    max_ms: float = 0.0

    def add(self, latency_ms: float, count: int = 1) -> None:
        """Modifies self. Latencies outside [SMALLEST_MS, LARGEST_MS] count as the nearer of the two."""
        latency_ms = min(max(latency_ms, SMALLEST_MS), LARGEST_MS)
        bucket = math.floor(math.log(latency_ms / SMALLEST_MS) / math.log(GROWTH))
        self.counts[bucket] = self.counts.get(bucket, 0) + count
        self.sum_ms += latency_ms * count
        self.min_ms = min(self.min_ms, latency_ms)
        self.max_ms = max(self.max_ms, latency_ms)

    def merge(self, other: LatencyHistogram) -> None:
        """Modifies self only."""
        for bucket, count in other.counts.items():
            self.counts[bucket] = self.counts.get(bucket, 0) + count
        self.sum_ms += other.sum_ms
        self.min_ms = min(self.min_ms, other.min_ms)
        self.max_ms = max(self.max_ms, other.max_ms)

    @property
    def count(self) -> int:
        return sum(self.counts.values())

    @property
    def mean_ms(self) -> float | None:
        """Exact. None when empty."""
        return self.sum_ms / self.count if self.counts else None

    def percentile(self, percent: float, failed: int = 0) -> float | None:
        """Nearest rank: the smallest latency that `percent` of all do not exceed. None when empty.

        `failed`: how many more there are that never came, so that each is later than any that did; infinite where one
        of them stands at the rank. Off by PERCENTILE_ERROR (relative) at most; the smallest and the largest latency are
        exact.
        """
        if not self.counts and not failed:
            return None
        # 1e-9: 0.95 * 20 must be rank 19 although floats may say 19.000000000000004
        rank = max(1, math.ceil(percent * (self.count + failed) / 100 - 1e-9))
        seen = 0
        for bucket in sorted(self.counts):
            seen += self.counts[bucket]
            if seen >= rank:
                middle: float = SMALLEST_MS * GROWTH ** (bucket + 0.5)
                return min(max(middle, self.min_ms), self.max_ms)
        return math.inf if failed else self.max_ms

    def percentiles(self, percents: Iterable[float]) -> tuple[float, ...]:
        """None of them when empty."""
        found = (self.percentile(percent) for percent in percents)
        return tuple(value for value in found if value is not None)


def samples_for(percent: float) -> int:
    """How many samples a percentile takes: with fewer, the largest of them may well lie below the true value.

    The rank of the true value among n samples is n q, give or take z sqrt(n q (1 - q)) (normal approximation of the
    binomial, z for 99 % confidence). It stays within the samples when n >= z^2 q / (1 - q). Rounded up to tens: 10
    for p50, 60 for p90, 130 for p95, 660 for p99.
    """
    share = percent / 100
    return math.ceil(CONFIDENT_Z**2 * share / (1 - share) / 10 - 1e-9) * 10


def union(histograms: Iterable[LatencyHistogram]) -> LatencyHistogram:
    """A new histogram of everything in all of them."""
    whole = LatencyHistogram()
    for histogram in histograms:
        whole.merge(histogram)
    return whole
