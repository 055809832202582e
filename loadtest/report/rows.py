"""The figures that a report shows, how far each may be trusted, and how they stand to those of a baseline."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from loadtest.report.record import Few, LoadReport
from loadtest.seen.figures import Distribution, Figures, StreamFigures, WithFailures
from loadtest.seen.histogram import samples_for
from loadtest.seen.intervals import Interval, interval_of

SAME = 0.1  # values closer than this share are called the same: two short runs of one server differ by several percent
RULE_OF_THREE = 3  # no failure among n: at 95 % confidence the rate is below 3 / n

Value = Callable[[Figures], float | None]


@dataclass(frozen=True)
class Line:
    """A figure that the page shows. `column`: its heading in the table of figures; empty: it is not there."""

    label: str
    unit: str
    value: Value  # infinite: a failed request stands there
    more_is_better: bool | None  # None: neither
    tile: bool = False
    column: str = ""
    percent: float | None = None  # of a percentile
    samples: Callable[[Figures], int] = lambda figures: figures.requests
    failures_late: bool = False

    @property
    def key(self) -> str:
        """Its name in JSON: `latency_p95_ms`."""
        unit = {"%": "percent"}.get(self.unit, self.unit.replace("/s", "_per_s"))
        return re.sub(r"\W+", "_", f"{self.label} {unit}".strip().lower())


def _of_stream(value: Callable[[StreamFigures], float | None]) -> Value:
    return lambda figures: None if figures.stream is None else value(figures.stream)


def _all_of_stream(of: Callable[[StreamFigures], WithFailures | None]) -> Callable[[Figures], WithFailures | None]:
    return lambda figures: None if figures.stream is None else of(figures.stream)


def _latency(label: str, percent: int, *, tile: bool = False, column: str = "") -> Line:
    def value(figures: Figures) -> float | None:
        return {50: figures.p50_ms, 95: figures.p95_ms, 99: figures.p99_ms}[percent]

    return Line(f"{label} p{percent}", "ms", value, False, tile, column, percent)


def _waits(label: str, name: str, *percents: int, tiles: Sequence[int] = (), columns: Mapping[int, str]) -> list[Line]:
    """Lines of one distribution of a stream."""

    def seen(figures: Figures) -> Distribution | None:
        return None if figures.stream is None else getattr(figures.stream, name)

    def value(percent: int, figures: Figures) -> float | None:
        found = seen(figures)
        return None if found is None else {50: found.p50_ms, 90: found.p90_ms, 99: found.p99_ms}[percent]

    def samples(figures: Figures) -> int:
        found = seen(figures)
        return 0 if found is None else found.count

    return [
        Line(f"{label} p{percent}", "ms", partial(value, percent), False, percent in tiles, columns.get(percent, ""),
             percent, samples)
        for percent in percents
    ]  # fmt: skip


def _with_failures(
    label: str, percent: int, of: Callable[[Figures], WithFailures | None], *, tile: bool = False, column: str = ""
) -> Line:
    def value(figures: Figures) -> float | None:
        seen = of(figures)
        if seen is None or not seen.count:
            return None
        found = seen.p95_ms if percent == 95 else seen.p99_ms
        return math.inf if found is None else found

    def samples(figures: Figures) -> int:
        seen = of(figures)
        return 0 if seen is None else seen.count

    label = f"{label} p{percent}, failures late"
    return Line(label, "ms", value, False, tile, column, percent, samples, failures_late=True)


_ERRORS = Line("Errors", "%", lambda figures: 100 * figures.error_rate, False, tile=True)
_ENCODER = (
    Line("Throughput", "texts/s", lambda figures: figures.texts_per_s, True, tile=True, column="texts/s"),
    Line("Requests answered", "requests/s", lambda figures: figures.requests_per_s, True),
    _latency("Latency", 50, tile=True, column="p50, ms"),
    _latency("Latency", 95, tile=True, column="p95, ms"),
    _latency("Latency", 99, tile=True, column="p99, ms"),
    _with_failures("Latency", 95, lambda f: f.all_requests, tile=True, column="p95, failures late, ms"),
    _with_failures("Latency", 99, lambda f: f.all_requests),
    Line("Latency mean", "ms", lambda figures: figures.mean_ms, False),
    Line("Latency max", "ms", lambda figures: figures.max_ms, None, column="max, ms"),
    _ERRORS,
    Line("Tokens a text", "", lambda figures: figures.tokens_per_text, None),
)
_GENERATOR = (
    Line("Output", "tokens/s", _of_stream(lambda s: s.output_tokens_per_s), True, tile=True, column="tokens/s"),
    Line("Prompts", "tokens/s", _of_stream(lambda s: s.prompt_tokens_per_s), True),
    Line("Requests answered", "requests/s", lambda figures: figures.requests_per_s, True),
    *_waits("First token", "first_token", 50, 90, 99, tiles=(50, 99),
            columns={50: "first p50, ms", 99: "first p99, ms"}),
    _with_failures("First token", 99, _all_of_stream(lambda s: s.all_first_tokens), tile=True),
    *_waits("Response gap", "gap", 50, 90, 99, tiles=(99,), columns={50: "gap p50, ms", 99: "gap p99, ms"}),
    _with_failures("Response gap", 99, _all_of_stream(lambda s: s.all_gaps)),
    *_waits("Largest gap of a stream", "largest_gap", 50, 99, columns={}),
    *_waits("Inter-token", "inter_token", 50, 90, 99, tiles=(99,), columns={99: "inter-token p99, ms"}),
    _with_failures("Inter-token", 99, _all_of_stream(lambda s: s.all_inter_tokens)),
    *_waits("Time per token of a stream", "per_token", 50, 99, columns={}),
    _latency("Whole answer", 50),
    _latency("Whole answer", 95),
    _latency("Whole answer", 99, column="whole p99, ms"),
    _with_failures("Whole answer", 95, lambda f: f.all_requests),
    _ERRORS,
    Line("Tokens a response", "", _of_stream(lambda s: s.tokens_per_response), None),
    Line("Cancelled", "requests", _of_stream(lambda s: s.cancelled), None),
)  # fmt: skip


@dataclass(frozen=True)
class ReportRow:
    """One figure, and how it stands to the baseline's. Infinite: a failed request stands there."""

    line: Line
    value: float | None
    interval: Interval | None
    baseline: float | None
    baseline_interval: Interval | None
    ratio: float | None  # value / baseline; None without a baseline, or when that is 0 or a failure
    verdict: str  # "better", "worse", "same", "noise" (the intervals overlap), "unknown" (there are none), or ""

    @property
    def label(self) -> str:
        return self.line.label


def lines_of(figures: Figures) -> tuple[Line, ...]:
    return _ENCODER if figures.stream is None else _GENERATOR


def few_of(figures: Figures) -> dict[str, Few]:
    """The percentiles that rest on too few samples, by the key of their line."""
    found = {}
    for line in lines_of(figures):
        seen = line.samples(figures)
        if line.percent is not None and line.value(figures) is not None and seen < samples_for(line.percent):
            found[line.key] = Few(seen=seen, needed=samples_for(line.percent))
    return found


def intervals_by_line(whole: Figures, resampled: Sequence[Figures], wider: float) -> dict[str, Interval]:
    """Of each figure that more or less of is better, by the key of its line. `wider`: than the resamples alone say."""
    found = {}
    for line in lines_of(whole):
        seen = [value for value in map(line.value, resampled) if value is not None]
        value = line.value(whole)
        if value is not None and line.more_is_better is not None and seen and len(seen) == len(resampled):
            found[line.key] = interval_of(value, seen, wider)
    if _ERRORS.key in found and not whole.failed:
        found[_ERRORS.key] = Interval(low=0.0, high=min(100.0, 100 * RULE_OF_THREE / max(1, whole.ended)))
    return found


def rows_of(
    figures: Figures,
    baseline: Figures | None,
    intervals: Mapping[str, Interval] | None = None,
    baseline_intervals: Mapping[str, Interval] | None = None,
) -> list[ReportRow]:
    rows = []
    for line in lines_of(figures):
        value = line.value(figures)
        old = line.value(baseline) if baseline is not None else None
        ratio = value / old if value not in (None, math.inf) and old not in (None, math.inf, 0) else None
        own, other = (found.get(line.key) if found else None for found in (intervals, baseline_intervals))
        rows.append(ReportRow(line, value, own, old, other, ratio, _verdict(line, value, old, own, other)))
    return rows


def pair_rows(report: LoadReport, baseline: LoadReport) -> list[ReportRow]:
    return rows_of(report.figures, baseline.figures, report.intervals, baseline.intervals)


def _verdict(line: Line, new: float | None, old: float | None, own: Interval | None, other: Interval | None) -> str:
    if new is None or old is None or line.more_is_better is None:
        return ""
    if new == old:
        return "same"
    if own is None or other is None:
        return "unknown"
    if own.overlaps(other):
        return "noise"
    if old and math.isfinite(old) and math.isfinite(new) and abs(new / old - 1) <= SAME:
        return "same"
    return "better" if (new > old) == line.more_is_better else "worse"


def number(value: float | None) -> str:
    """Three significant digits or more: `0.0123`, `4.56`, `78.9`, `12,345`; infinite: a request that failed."""
    if value is None:
        return "\N{EN DASH}"
    if math.isinf(value):
        return "failed"
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{min(digits, 6)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def span(interval: Interval | None) -> str:
    if interval is None:
        return ""
    low, high = (number(math.inf if end is None else end) for end in (interval.low, interval.high))
    return low if low == high else f"{low} to {high}"
