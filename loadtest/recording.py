"""What one run leaves behind: a cell per protocol and interval of the clock, small enough to send to a master.

An answered request's latency, and a failed request, belong to the interval in which the request STARTED: a request that
hangs past the end of the measured window is still a failure of the window. Throughput counts requests in the interval
in which they were ANSWERED. Both are what a reader expects of the word, and neither flatters the server.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from loadtest.histogram import LatencyHistogram

MAX_INTERVALS = 1800  # a longer run is recorded in wider intervals, so that memory stays bounded
PROGRESS_PREFIX = "trireme-progress "  # of a line of JSON that the locustfile prints, and `loadtest.run` reads
MAX_EXAMPLE = 300  # characters of one error message


@dataclass
class Cell:
    """One protocol in one interval."""

    latency: LatencyHistogram = field(default_factory=LatencyHistogram)  # requests started here and answered
    errors: dict[str, int] = field(default_factory=dict)  # requests started here and failed, by kind
    answered: int = 0  # requests answered here
    texts: int = 0  # texts in those
    tokens: int = 0  # tokens in those; 0 when the model does not count them
    truncated: int = 0  # texts in those that the model cut

    def merge(self, other: Cell) -> None:
        """Modifies self only."""
        self.latency.merge(other.latency)
        for kind, count in other.errors.items():
            self.errors[kind] = self.errors.get(kind, 0) + count
        self.answered += other.answered
        self.texts += other.texts
        self.tokens += other.tokens
        self.truncated += other.truncated


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
    examples: dict[str, str] = field(default_factory=dict)  # kind of error -> the first message of that kind

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
        self.examples = {**other.examples, **self.examples}

    def take(self) -> Trace:
        """Everything recorded so far. Modifies self: it is empty afterwards."""
        taken = Trace(self.interval_s, self.started_at, self.cells, self.users, self.examples)
        self.cells, self.users, self.examples = {}, {}, {}
        return taken

    def key(self, moment: float) -> int:
        return math.floor(moment / self.interval_s) * self.interval_s

    def _cell(self, protocol: str, moment: float) -> Cell:
        return self.cells.setdefault(protocol, {}).setdefault(self.key(moment), Cell())

    def to_json(self) -> str:
        return str(_adapter().dump_json(self).decode())

    @staticmethod
    def from_json(text: str | bytes) -> Trace:
        """Raises ValueError: not a trace."""
        trace: Trace = _adapter().validate_json(text)
        return trace


def interval_for(duration_s: int) -> int:
    """Seconds an interval of a run must be wide."""
    return max(1, math.ceil(duration_s / MAX_INTERVALS))


@cache
def _adapter() -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(Trace)
