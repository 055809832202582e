"""The figures that a report shows, and how they stand to those of a baseline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from loadtest.figures import Figures, StreamFigures

SAME = 0.1  # values closer than this share are called the same: two short runs of one server differ by several percent

Value = Callable[[Figures], float | None]


@dataclass(frozen=True)
class Line:
    """A figure that the page shows. `column`: its heading in the table of figures; empty: it is not there."""

    label: str
    unit: str
    value: Value
    more_is_better: bool | None  # None: neither
    tile: bool = False
    column: str = ""


def _of_stream(value: Callable[[StreamFigures], float | None]) -> Value:
    return lambda figures: None if figures.stream is None else value(figures.stream)


_ERRORS = Line("Errors", "%", lambda figures: 100 * figures.error_rate, False, tile=True)
_ENCODER = (
    Line("Throughput", "texts/s", lambda figures: figures.texts_per_s, True, tile=True, column="texts/s"),
    Line("Requests answered", "requests/s", lambda figures: figures.requests_per_s, True),
    Line("Latency p50", "ms", lambda figures: figures.p50_ms, False, tile=True, column="p50, ms"),
    Line("Latency p95", "ms", lambda figures: figures.p95_ms, False, tile=True, column="p95, ms"),
    Line("Latency p99", "ms", lambda figures: figures.p99_ms, False, tile=True, column="p99, ms"),
    Line("Latency mean", "ms", lambda figures: figures.mean_ms, False),
    Line("Latency max", "ms", lambda figures: figures.max_ms, False, column="max, ms"),
    _ERRORS,
    Line("Tokens a text", "", lambda figures: figures.tokens_per_text, None),
)
_GENERATOR = (
    Line("Output", "tokens/s", _of_stream(lambda s: s.output_tokens_per_s), True, tile=True, column="tokens/s"),
    Line("Prompts", "tokens/s", _of_stream(lambda s: s.prompt_tokens_per_s), True),
    Line("Requests answered", "requests/s", lambda figures: figures.requests_per_s, True),
    Line("First token p50", "ms", _of_stream(lambda s: s.first_token.p50_ms), False, tile=True, column="first p50, ms"),
    Line("First token p90", "ms", _of_stream(lambda s: s.first_token.p90_ms), False),
    Line("First token p99", "ms", _of_stream(lambda s: s.first_token.p99_ms), False, tile=True, column="first p99, ms"),
    Line("Gap p50", "ms", _of_stream(lambda s: s.gap.p50_ms), False, column="gap p50, ms"),
    Line("Gap p90", "ms", _of_stream(lambda s: s.gap.p90_ms), False),
    Line("Gap p99", "ms", _of_stream(lambda s: s.gap.p99_ms), False, tile=True, column="gap p99, ms"),
    Line("Largest gap of a stream p50", "ms", _of_stream(lambda s: s.largest_gap.p50_ms), False),
    Line("Largest gap of a stream p99", "ms", _of_stream(lambda s: s.largest_gap.p99_ms), False),
    Line("Time per token p50", "ms", _of_stream(lambda s: s.per_token.p50_ms), False),
    Line("Time per token p99", "ms", _of_stream(lambda s: s.per_token.p99_ms), False),
    Line("Whole answer p50", "ms", lambda figures: figures.p50_ms, False),
    Line("Whole answer p95", "ms", lambda figures: figures.p95_ms, False),
    Line("Whole answer p99", "ms", lambda figures: figures.p99_ms, False, column="whole p99, ms"),
    _ERRORS,
    Line("Tokens a response", "", _of_stream(lambda s: s.tokens_per_response), None),
    Line("Cancelled", "requests", _of_stream(lambda s: s.cancelled), None),
)


@dataclass(frozen=True)
class Row:
    """One figure, and how it stands to the baseline's."""

    line: Line
    value: float | None
    baseline: float | None
    ratio: float | None  # value / baseline; None without a baseline, or when that is 0
    verdict: str  # "better", "worse", "same" or ""

    @property
    def label(self) -> str:
        return self.line.label


def lines_of(figures: Figures) -> tuple[Line, ...]:
    return _ENCODER if figures.stream is None else _GENERATOR


def rows_of(figures: Figures, baseline: Figures | None) -> list[Row]:
    rows = []
    for line in lines_of(figures):
        value = line.value(figures)
        old = line.value(baseline) if baseline is not None else None
        ratio = value / old if value is not None and old else None
        verdict = ""
        if value is not None and old is not None and line.more_is_better is not None:
            near = value == old or (ratio is not None and abs(ratio - 1) <= SAME)
            verdict = "same" if near else "better" if (value > old) == line.more_is_better else "worse"
        rows.append(Row(line, value, old, ratio, verdict))
    return rows
