"""What an operator wants to see of a running engine, as plain numbers."""

from __future__ import annotations

import time
from bisect import bisect_left
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.settings import ServedModel

TTFT_BOUNDS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
ITL_BOUNDS_S = (0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56)


@dataclass
class Histogram:
    """`counts[i]` values were at most `bounds[i]`, and more than the bound before; the last count is of the rest."""

    bounds: tuple[float, ...]
    counts: list[int] = field(default_factory=list)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    @property
    def cumulative(self) -> list[int]:
        """As Prometheus counts: values at most each bound, then all of them."""
        sums, running = [], 0
        for count in self.counts:
            running += count
            sums.append(running)
        return sums


@dataclass
class Counters:
    """Since the start. `ttft` is from arrival to the first token, `itl` between tokens of one request; seconds."""

    requests: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0  # of them: found in the cache
    output_tokens: int = 0
    executor_seconds: float = 0.0  # the graph, with copies to and from the device
    sample_seconds: float = 0.0  # choosing tokens
    step_seconds: float = 0.0  # all of a step: the two above, planning, detokenising
    ttft: Histogram = field(default_factory=lambda: Histogram(TTFT_BOUNDS_S))
    itl: Histogram = field(default_factory=lambda: Histogram(ITL_BOUNDS_S))

    @property
    def host_seconds_per_step(self) -> float:
        """What a step takes beside the executor: planning, sampling, detokenising."""
        return (self.step_seconds - self.executor_seconds) / max(self.steps, 1)


@dataclass(frozen=True)
class Gauges:
    """At this moment."""

    running: int
    waiting: int
    slots: int
    kept: int  # finished sequences whose cache can still be shared
    cache_tokens: int  # positions that running sequences fill
    cache_use: float  # of all positions that they may fill
    recovering: int  # 1 while the executor is lost and another one starts


class Exporter:
    """Puts counters and gauges into Triton's /metrics. `family` is `pb_utils.MetricFamily`.

    Histograms are written as Prometheus reads them: cumulative counters with a label `le`, and a sum.
    """

    def __init__(self, family: Any, served: ServedModel) -> None:
        self._family, self._families = family, dict[str, Any]()
        self._metrics: dict[tuple[str, str], Any] = {}
        self._sent: dict[tuple[str, str], float] = {}
        self._labels = {"model": served.ensemble, "version": str(served.version)}
        digests = {"precision": served.precision, "digest": served.model_digest, "spec_digest": served.spec_digest}
        info = self._open("trireme_model_info", "What is served: always 1; the labels say it", family.GAUGE)
        self._info = info.Metric(labels={**self._labels, **digests})
        self._info.set(1)
        self._last: tuple[float, int] | None = None

    def export(self, counters: Counters, gauges: Gauges) -> None:
        for name, value in vars(gauges).items():
            self._set(f"trireme_generation_{name}", value)
        now, (then, before) = time.monotonic(), self._last or (time.monotonic(), counters.output_tokens)
        if now > then:
            self._set("trireme_generation_tokens_per_second", (counters.output_tokens - before) / (now - then))
        self._last = (now, counters.output_tokens)
        totals = ("requests", "steps", "prompt_tokens", "reused_tokens", "output_tokens")
        for name in (*totals, "executor_seconds", "sample_seconds", "step_seconds"):
            self._add(f"trireme_generation_{name}_total", getattr(counters, name))
        self._histogram("trireme_generation_time_to_first_token_seconds", counters.ttft)
        self._histogram("trireme_generation_inter_token_seconds", counters.itl)

    def _histogram(self, name: str, histogram: Histogram) -> None:
        for bound, count in zip((*map(str, histogram.bounds), "+Inf"), histogram.cumulative, strict=True):
            self._add(f"{name}_bucket", count, le=bound)
        self._add(f"{name}_count", histogram.cumulative[-1])
        self._add(f"{name}_sum", histogram.total)

    def _set(self, name: str, value: float) -> None:
        self._metric(name, self._family.GAUGE, {}).set(value)

    def _add(self, name: str, value: float, **labels: str) -> None:
        key = (name, labels.get("le", ""))
        metric = self._metric(name, self._family.COUNTER, labels)
        if value > self._sent.get(key, 0.0):
            metric.increment(value - self._sent.get(key, 0.0))
            self._sent[key] = value

    def _metric(self, name: str, kind: Any, labels: dict[str, str]) -> Any:
        key = (name, labels.get("le", ""))
        if key not in self._metrics:
            self._metrics[key] = self._open(name, name.replace("_", " "), kind).Metric(labels=self._labels | labels)
        return self._metrics[key]

    def _open(self, name: str, description: str, kind: Any) -> Any:
        if name not in self._families:
            self._families[name] = self._family(name=name, description=description, kind=kind)
        return self._families[name]
