"""What one run leaves behind: a cell per protocol and interval of the clock, small enough to send to a master.

An answered request's latency, and a failed request, belong to the interval in which the request STARTED: a request that
hangs past the end of the measured window is still a failure of the window. Throughput counts requests in the interval
in which they were ANSWERED. Both are what a reader expects of the word, and neither flatters the server.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from loadtest.seen.histogram import LatencyHistogram

if TYPE_CHECKING:
    from loadtest.requests.streaming import Stream

PROGRESS_PREFIX = "trireme-progress "  # of a line of JSON that the locustfile prints, and `loadtest.drive.run` reads
MAX_EXAMPLE = 300  # characters of one error message


@dataclass
class StreamCell:
    """What a generator's answers add to a cell. A gap is the time between two responses with tokens of one stream."""

    first_token: LatencyHistogram = field(default_factory=LatencyHistogram)  # requests started here, until tokens came
    gap: LatencyHistogram = field(default_factory=LatencyHistogram)  # that began here
    largest_gap: LatencyHistogram = field(default_factory=LatencyHistogram)  # one a request that started here
    inter_token: LatencyHistogram = field(
        default_factory=LatencyHistogram
    )  # one a token: its gap over the gap's tokens
    per_token: LatencyHistogram = field(default_factory=LatencyHistogram)  # the same: mean, after the first response
    responses: int = 0  # with tokens, that arrived here
    output_tokens: int = 0  # that arrived here
    lost_tokens: int = 0  # that arrived here, in streams that failed in the end; not among the others
    failed_tokens: int = 0  # of requests started here that failed: asked for
    owed_tokens: int = 0  # of requests started here that failed or whose client left: asked for, and not received
    prompt_tokens: int = 0  # of requests answered here
    cancelled: int = 0  # requests started here whose client left

    def merge(self, other: StreamCell) -> None:
        """Modifies self only."""
        for part in fields(self):
            mine, theirs = getattr(self, part.name), getattr(other, part.name)
            if isinstance(mine, LatencyHistogram):
                mine.merge(theirs)
            else:
                setattr(self, part.name, mine + theirs)


@dataclass
class Cell:
    """One protocol in one interval."""

    started: int = 0  # requests, whatever became of them
    latency: LatencyHistogram = field(default_factory=LatencyHistogram)  # requests started here and answered
    errors: dict[str, int] = field(default_factory=dict)  # requests started here and failed, by kind
    answered: int = 0  # requests answered here
    texts: int = 0  # texts in those
    tokens: int = 0  # tokens in those; 0 when the model does not count them
    truncated: int = 0  # texts in those that the model cut
    stream: StreamCell | None = None  # None: no generator

    def merge(self, other: Cell) -> None:
        """Modifies self only."""
        self.started += other.started
        self.latency.merge(other.latency)
        for kind, count in other.errors.items():
            self.errors[kind] = self.errors.get(kind, 0) + count
        self.answered += other.answered
        self.texts += other.texts
        self.tokens += other.tokens
        self.truncated += other.truncated
        if other.stream is not None:
            self.stream = self.stream or StreamCell()
            self.stream.merge(other.stream)


@dataclass
class Trace:
    """Cells of a whole run or, in a worker's report to its master, of the time since the last report.

    Keys of `cells` and `users` are seconds since the epoch, multiples of `interval_s`: the clocks of all workers give
    the same keys.
    """

    interval_s: int = 1
    started_at: float = 0.0  # seconds since the epoch; 0 in a worker's report
    cells: dict[str, dict[int, Cell]] = field(default_factory=dict)  # protocol -> interval -> Cell
    users: dict[int, int] = field(default_factory=dict)  # interval -> users that ran then; each process counts its own
    late: dict[int, LatencyHistogram] = field(default_factory=dict)  # interval -> how late timers of the generator were
    examples: dict[str, str] = field(default_factory=dict)  # kind of error -> the first message of that kind
    stopped_at: float | None = None  # seconds since the epoch; None: the run went to its planned end

    def started(self, protocol: str, started_at: float) -> None:
        """Modifies self. Each request is told of here once, and once more when it ends."""
        self._cell(protocol, started_at).started += 1

    def answered(
        self, protocol: str, started_at: float, latency_ms: float, *, texts: int, tokens: int, truncated: int
    ) -> None:
        """Modifies self."""
        self._cell(protocol, started_at).latency.add(latency_ms)
        cell = self._cell(protocol, started_at + latency_ms / 1000)
        cell.answered += 1
        cell.texts += texts
        cell.tokens += tokens
        cell.truncated += truncated

    def failed(self, protocol: str, started_at: float, kind: str, message: str) -> None:
        """Modifies self. `kind` comes from a closed set, `message` does not: only the first of a kind is kept."""
        errors = self._cell(protocol, started_at).errors
        errors[kind] = errors.get(kind, 0) + 1
        self.examples.setdefault(kind, message[:MAX_EXAMPLE])

    def streamed(self, protocol: str, started_at: float, stream: Stream) -> None:
        """Modifies self. Tokens count where they arrived, times where they began; a stream that failed gives none."""
        if stream.error is not None or stream.left:
            self._stream_cell(protocol, started_at).owed_tokens += max(0, stream.asked - stream.tokens)
        if stream.error is not None:
            self._stream_cell(protocol, started_at).failed_tokens += stream.asked
            for arrived_s, count in stream.arrivals:
                self._stream_cell(protocol, started_at + arrived_s).lost_tokens += count
            self.failed(protocol, started_at, stream.error.kind, stream.error.message)
            return
        before_s: float | None = None
        for arrived_s, count in stream.arrivals:
            cell = self._stream_cell(protocol, started_at + arrived_s)
            cell.responses += 1
            cell.output_tokens += count
            if before_s is not None:
                gap_ms = (arrived_s - before_s) * 1000
                began = self._stream_cell(protocol, started_at + before_s)
                began.gap.add(gap_ms)
                began.inter_token.add(gap_ms / count, count)
            before_s = arrived_s
        self._times(self._stream_cell(protocol, started_at), stream.arrivals)
        if stream.left:
            self._stream_cell(protocol, started_at).cancelled += 1
            return
        self.answered(protocol, started_at, stream.ended_s * 1000, texts=1, tokens=0, truncated=0)
        self._stream_cell(protocol, started_at + stream.ended_s).prompt_tokens += stream.prompt_tokens

    @staticmethod
    def _times(cell: StreamCell, arrivals: list[tuple[float, int]]) -> None:
        if not arrivals:
            return
        moments = [moment for moment, _ in arrivals]
        cell.first_token.add(moments[0] * 1000)
        if len(moments) > 1:
            tokens = sum(count for _, count in arrivals[1:])
            cell.per_token.add((moments[-1] - moments[0]) * 1000 / tokens)
            cell.largest_gap.add(max(late - early for early, late in pairwise(moments)) * 1000)

    def sample_late(self, now: float, late_ms: float) -> None:
        """Modifies self. `now` is when the timer should have rung."""
        self.late.setdefault(self.key(now), LatencyHistogram()).add(late_ms)

    def sample_users(self, now: float, count: int) -> None:
        """Modifies self. The first sample of an interval stands."""
        self.users.setdefault(self.key(now), count)

    def merge(self, other: Trace) -> None:
        """Modifies self. Users add up: `other` must come from another process, or from other intervals."""
        for protocol, cells in other.cells.items():
            mine = self.cells.setdefault(protocol, {})
            for key, cell in cells.items():
                mine.setdefault(key, Cell()).merge(cell)
        for key, count in other.users.items():
            self.users[key] = self.users.get(key, 0) + count
        for key, histogram in other.late.items():
            self.late.setdefault(key, LatencyHistogram()).merge(histogram)
        self.examples = {**other.examples, **self.examples}

    def take(self) -> Trace:
        """Everything recorded so far. Modifies self: it is empty afterwards."""
        taken = Trace(self.interval_s, self.started_at, self.cells, self.users, self.late, self.examples)
        self.cells, self.users, self.late, self.examples = {}, {}, {}, {}
        return taken

    def key(self, moment: float) -> int:
        return math.floor(moment / self.interval_s) * self.interval_s

    def _cell(self, protocol: str, moment: float) -> Cell:
        return self.cells.setdefault(protocol, {}).setdefault(self.key(moment), Cell())

    def _stream_cell(self, protocol: str, moment: float) -> StreamCell:
        cell = self._cell(protocol, moment)
        cell.stream = cell.stream or StreamCell()
        return cell.stream

    def to_json(self) -> str:
        return str(_adapter().dump_json(self).decode())

    @staticmethod
    def from_json(text: str | bytes) -> Trace:
        """Raises ValueError: not a trace."""
        trace: Trace = _adapter().validate_json(text)
        return trace


@cache
def _adapter() -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(Trace)
