"""Figures of a run: frozen records, and how they follow from a trace. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from pydantic import BaseModel, ConfigDict

from loadtest.histogram import LatencyHistogram
from loadtest.recording import Cell, Trace
from loadtest.shapes import SETTLE_S, Schedule

KNEE = 0.95  # the knee is the smallest load that reaches this share of the best throughput


class Record(BaseModel):
    """A part of a report: frozen, and closed to keys that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Figures(Record):
    """One population of requests. Latencies are of answered requests; None when there are none."""

    requests: int  # started in the window and answered
    texts_per_s: float
    requests_per_s: float
    mean_ms: float | None
    p50_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    max_ms: float | None
    errors: dict[str, int]  # started in the window and failed, by kind
    tokens_per_text: float | None  # None: the model does not count tokens
    truncated_share: float | None  # of texts

    @property
    def failed(self) -> int:
        return sum(self.errors.values())

    @property
    def error_rate(self) -> float:
        """Failed requests over all; 0 when there were none at all."""
        return self.failed / max(1, self.failed + self.requests)


class Point(Record):
    """One interval of the measured window. Latencies and errors are of the requests that started in it."""

    elapsed_s: float  # middle of the interval, from the start of the window
    users: int | None  # None: no sample fell into it
    p50_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    requests_per_s: float
    texts_per_s: float
    errors: dict[str, int]


class Step(Record):
    """One plateau of the shape `steps`, without its first seconds."""

    users: int
    figures: Figures


def measured_keys(trace: Trace, schedule: Schedule) -> range:
    """Intervals of the measured window: whole ones, the first that begins after the warm-up."""
    width = trace.interval_s
    first = math.ceil((trace.started_at + schedule.warm_up_s) / width) * width
    return range(first, first + max(1, schedule.duration_s // width) * width, width)


def figures_of(cells: Iterable[Cell], seconds: float, *, counts_tokens: bool, counts_truncated: bool) -> Figures:
    """`cells` were recorded over `seconds` of the clock."""
    whole = Cell()
    for cell in cells:
        whole.merge(cell)
    latency, texts = whole.latency, max(1, whole.texts)
    return Figures(
        requests=latency.count,
        texts_per_s=whole.texts / seconds,
        requests_per_s=whole.answered / seconds,
        mean_ms=latency.mean_ms,
        p50_ms=latency.percentile(50),
        p95_ms=latency.percentile(95),
        p99_ms=latency.percentile(99),
        max_ms=latency.max_ms if latency.counts else None,
        errors=dict(sorted(whole.errors.items())),
        tokens_per_text=whole.tokens / texts if counts_tokens and whole.texts else None,
        truncated_share=whole.truncated / texts if counts_truncated and whole.texts else None,
    )


def points_of(trace: Trace, keys: range) -> tuple[Point, ...]:
    """One point an interval, empty ones included."""
    points = []
    for key in keys:
        latency, errors, answered, texts = LatencyHistogram(), Counter[str](), 0, 0
        for cells in trace.cells.values():
            if (cell := cells.get(key)) is not None:
                latency.merge(cell.latency)
                errors.update(cell.errors)
                answered += cell.answered
                texts += cell.texts
        points.append(
            Point(
                elapsed_s=key - keys.start + trace.interval_s / 2,
                users=trace.users.get(key),
                p50_ms=latency.percentile(50),
                p95_ms=latency.percentile(95),
                p99_ms=latency.percentile(99),
                requests_per_s=answered / trace.interval_s,
                texts_per_s=texts / trace.interval_s,
                errors=dict(sorted(errors.items())),
            )
        )
    return tuple(points)


def steps_of(trace: Trace, schedule: Schedule, *, counts_tokens: bool, counts_truncated: bool) -> tuple[Step, ...]:
    """Figures of each plateau; none for the shape `constant`."""
    if schedule.shape == "constant":
        return ()
    steps = []
    for number, users in enumerate(schedule.plateaux):
        begins = trace.started_at + schedule.warm_up_s + number * schedule.step_s
        keys = [
            key
            for key in measured_keys(trace, schedule)
            if begins + SETTLE_S <= key and key + trace.interval_s <= begins + schedule.step_s
        ]
        cells = [cell for cells in trace.cells.values() for key, cell in cells.items() if key in keys]
        seconds = max(1, len(keys)) * trace.interval_s
        figures = figures_of(cells, seconds, counts_tokens=counts_tokens, counts_truncated=counts_truncated)
        steps.append(Step(users=users, figures=figures))
    return tuple(steps)


def knee_of(steps: Sequence[Step]) -> Step | None:
    """The first step that reaches KNEE of the best throughput: more users than that only wait longer."""
    best = max((step.figures.texts_per_s for step in steps), default=0.0)
    return next((step for step in steps if best and step.figures.texts_per_s >= KNEE * best), None)
