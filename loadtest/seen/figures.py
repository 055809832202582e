"""Figures of a run: frozen records, and how they follow from a trace. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from loadtest.seen.histogram import LatencyHistogram
from loadtest.seen.recording import Cell, StreamCell, Trace
from loadtest.shapes import SETTLE_S, Schedule
from runtime.record import Record

KNEE = 0.95  # the knee is the smallest load that reaches this share of the best throughput


class Distribution(Record):
    """Of times in milliseconds; None where nothing was seen."""

    count: int
    mean_ms: float | None
    p50_ms: float | None
    p90_ms: float | None
    p99_ms: float | None
    max_ms: float | None


class WithFailures(Record):
    """Percentiles over everything that was asked for: what failed counts as later than anything that came.

    None where a failure stands at that rank, or where nothing was asked for (`count` is 0).
    """

    count: int  # those that failed included
    failed: int
    p95_ms: float | None
    p99_ms: float | None


class StreamFigures(Record):
    """What a generator's answers show beside their latency, which is that of the whole answer.

    Times are of streams that did not fail. A gap is the time between two responses with tokens of one stream: what its
    reader waits, which `stream_interval_ms` sets. A response holds what was made since the last one, so `inter_token`
    and `per_token` are the pace whatever the grouping.
    """

    first_token: Distribution
    gap: Distribution
    largest_gap: Distribution  # one a stream
    per_token: Distribution  # one a stream: time from its first response to its last, over the tokens after the first
    inter_token: Distribution | None = None  # one a token: the gap before its response, over the tokens in that
    all_first_tokens: WithFailures | None = None  # a failed request had none
    all_gaps: WithFailures | None = None  # a failed request has one gap that never ended
    all_inter_tokens: WithFailures | None = None  # every token that a failed request asked for is late
    output_tokens: int  # that arrived in the window
    output_tokens_per_s: float
    prompt_tokens: int  # of requests answered in the window
    prompt_tokens_per_s: float
    tokens_per_response: float | None
    cancelled: int  # requests started in the window that their client left, as it was asked to
    lost_tokens: int  # that arrived in streams that failed; not among output_tokens


class Figures(Record):
    """One population of requests. Latencies are of answered requests, None when there are none; only `all_requests`
    knows of those that failed.
    """

    requests: int  # started in the window and answered
    texts_per_s: float
    requests_per_s: float
    mean_ms: float | None
    p50_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    max_ms: float | None
    all_requests: WithFailures | None = None  # None: a report from before failures were counted as late
    errors: dict[str, int]  # started in the window and failed, by kind
    tokens_per_text: float | None  # None: the model does not count tokens
    truncated_share: float | None  # of texts
    stream: StreamFigures | None = None  # of a generator; a text is a prompt there

    @property
    def throughput_per_s(self) -> float:
        """Of what the model is for: texts, or a generator's tokens."""
        return self.texts_per_s if self.stream is None else self.stream.output_tokens_per_s

    @property
    def failed(self) -> int:
        return sum(self.errors.values())

    @property
    def ended(self) -> int:
        """Answered, failed, or left by their client."""
        return self.requests + self.failed + (0 if self.stream is None else self.stream.cancelled)

    @property
    def error_rate(self) -> float:
        """Failed requests over all that ended; 0 when none did."""
        return self.failed / max(1, self.ended)


class StreamPoint(Record):
    """One interval of a generator's answers."""

    first_token_p50_ms: float | None
    first_token_p99_ms: float | None
    gap_p50_ms: float | None
    gap_p99_ms: float | None
    output_tokens_per_s: float


class Point(Record):
    """One interval of the measured window. Latencies and errors are of the requests that started in it."""

    elapsed_s: float  # middle of the interval, from the start of the window
    users: int | None  # with an arrival rate: requests under way; None: no sample fell into it
    p50_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    requests_per_s: float
    texts_per_s: float
    errors: dict[str, int]
    stream: StreamPoint | None = None

    @property
    def throughput_per_s(self) -> float:
        """As of `Figures`."""
        return self.texts_per_s if self.stream is None else self.stream.output_tokens_per_s


class Step(Record):
    """One plateau of the shape `steps`, without its first seconds."""

    users: int
    figures: Figures


def measured_keys(trace: Trace, schedule: Schedule) -> range:
    """Intervals of the measured window: whole ones, the first that begins after the warm-up. Of a run that was
    stopped, those that were over by then.
    """
    width = trace.interval_s
    first = math.ceil((trace.started_at + schedule.warm_up_s) / width) * width
    last = first + max(1, schedule.duration_s // width) * width
    if trace.stopped_at is not None:
        last = min(last, math.floor(trace.stopped_at / width) * width)
    return range(first, max(first, last), width)


@dataclass(frozen=True)
class Counted:
    """What the answers of the model tell."""

    tokens: bool = False  # of each text
    truncated: bool = False
    stream: bool = False  # it is a generator


def figures_of(cells: Iterable[Cell], seconds: float, counted: Counted) -> Figures:
    """`cells` were recorded over `seconds` of the clock."""
    whole = merged(cells)
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
        all_requests=with_failures(latency, sum(whole.errors.values())),
        errors=dict(sorted(whole.errors.items())),
        tokens_per_text=whole.tokens / texts if counted.tokens and whole.texts else None,
        truncated_share=whole.truncated / texts if counted.truncated and whole.texts else None,
        stream=_stream_figures(whole, seconds) if counted.stream else None,
    )


def merged(cells: Iterable[Cell]) -> Cell:
    """A new cell of everything in all of them."""
    whole = Cell()
    for cell in cells:
        whole.merge(cell)
    return whole


def with_failures(histogram: LatencyHistogram, failed: int) -> WithFailures:
    p95, p99 = (histogram.percentile(percent, failed) for percent in (95, 99))
    return WithFailures(
        count=histogram.count + failed,
        failed=failed,
        p95_ms=None if p95 == math.inf else p95,
        p99_ms=None if p99 == math.inf else p99,
    )


def _stream_figures(whole: Cell, seconds: float) -> StreamFigures:
    cell, failed = whole.stream or StreamCell(), sum(whole.errors.values())
    return StreamFigures(
        first_token=distribution_of(cell.first_token),
        gap=distribution_of(cell.gap),
        largest_gap=distribution_of(cell.largest_gap),
        per_token=distribution_of(cell.per_token),
        inter_token=distribution_of(cell.inter_token),
        all_first_tokens=with_failures(cell.first_token, failed),
        all_gaps=with_failures(cell.gap, failed),
        all_inter_tokens=with_failures(cell.inter_token, cell.failed_tokens),
        output_tokens=cell.output_tokens,
        output_tokens_per_s=cell.output_tokens / seconds,
        prompt_tokens=cell.prompt_tokens,
        prompt_tokens_per_s=cell.prompt_tokens / seconds,
        tokens_per_response=cell.output_tokens / cell.responses if cell.responses else None,
        cancelled=cell.cancelled,
        lost_tokens=cell.lost_tokens,
    )


def distribution_of(histogram: LatencyHistogram) -> Distribution:
    return Distribution(
        count=histogram.count,
        mean_ms=histogram.mean_ms,
        p50_ms=histogram.percentile(50),
        p90_ms=histogram.percentile(90),
        p99_ms=histogram.percentile(99),
        max_ms=histogram.max_ms if histogram.counts else None,
    )


def points_of(trace: Trace, keys: range, counted: Counted) -> tuple[Point, ...]:
    """One point an interval, empty ones included."""
    points = []
    for key in keys:
        cell = merged(cells[key] for cells in trace.cells.values() if key in cells)
        points.append(
            Point(
                elapsed_s=key - keys.start + trace.interval_s / 2,
                users=trace.users.get(key),
                p50_ms=cell.latency.percentile(50),
                p95_ms=cell.latency.percentile(95),
                p99_ms=cell.latency.percentile(99),
                requests_per_s=cell.answered / trace.interval_s,
                texts_per_s=cell.texts / trace.interval_s,
                errors=dict(sorted(cell.errors.items())),
                stream=_stream_point(cell.stream or StreamCell(), trace.interval_s) if counted.stream else None,
            )
        )
    return tuple(points)


def _stream_point(cell: StreamCell, seconds: float) -> StreamPoint:
    return StreamPoint(
        first_token_p50_ms=cell.first_token.percentile(50),
        first_token_p99_ms=cell.first_token.percentile(99),
        gap_p50_ms=cell.gap.percentile(50),
        gap_p99_ms=cell.gap.percentile(99),
        output_tokens_per_s=cell.output_tokens / seconds,
    )


def plateaux_of(trace: Trace, schedule: Schedule, settle_s: float = 0) -> list[list[int]]:
    """Intervals of each plateau, without its first seconds. The shape `constant` is one."""
    begin = trace.started_at + schedule.warm_up_s
    if len(schedule.plateaux) == 1:
        return [list(measured_keys(trace, schedule))]
    return [
        [
            key
            for key in measured_keys(trace, schedule)
            if begin + number * schedule.step_s + settle_s <= key
            and key + trace.interval_s <= begin + (number + 1) * schedule.step_s
        ]
        for number in range(len(schedule.plateaux))
    ]


def steps_of(trace: Trace, schedule: Schedule, counted: Counted) -> tuple[Step, ...]:
    """Figures of each plateau that was reached; none for the shape `constant`."""
    if schedule.shape == "constant":
        return ()
    steps = []
    for users, keys in zip(schedule.plateaux, plateaux_of(trace, schedule, SETTLE_S), strict=True):
        if not keys:  # the run was stopped before
            continue
        cells = [cell for cells in trace.cells.values() for key, cell in cells.items() if key in keys]
        steps.append(Step(users=users, figures=figures_of(cells, len(keys) * trace.interval_s, counted)))
    return tuple(steps)


def knee_of(steps: Sequence[Step]) -> Step | None:
    """The first step that reaches KNEE of the best throughput: more users than that only wait longer."""
    best = max((step.figures.throughput_per_s for step in steps), default=0.0)
    return next((step for step in steps if best and step.figures.throughput_per_s >= KNEE * best), None)
