"""`LoadReport`: what one load test saw, and of which weights on which machine. Kept as JSON; judged; drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from loadtest.errors import LoadInputError
from loadtest.requests.prompts import StreamLoad
from loadtest.seen.counters import GeneratorStatistics, Ledger, ModelStatistics, RequestLedger
from loadtest.seen.figures import Figures, Point, Step
from loadtest.seen.histogram import PERCENTILE_ERROR
from loadtest.seen.intervals import Interval
from loadtest.seen.proof import ProofFigure
from loadtest.seen.server import Identity
from runtime.record import Record

FORMAT: Literal["trireme-load-report-1"] = "trireme-load-report-1"


class Load(Record):
    """The load that was asked for."""

    protocol: Literal["grpc", "http", "both"]
    gateway: bool = False  # requests went through one
    shape: Literal["constant", "steps"]
    users: int
    steps: int
    duration_s: int
    warm_up_s: int
    texts_per_request: int
    request_timeout_s: float
    seed: int
    processes: int
    rate_per_s: float | None = None  # requests started at random moments; None: each user waits for its answer
    stream: StreamLoad | None = None  # None: an encoder's load
    texts_file: str  # name only
    texts_digest: str
    texts_lines: int

    @property
    def unit(self) -> str:
        return "users" if self.rate_per_s is None else "requests/s"

    def amount(self, users: int) -> float:
        """The load that so many of the users make, in `unit`."""
        return users if self.rate_per_s is None else self.rate_per_s * users / self.users

    def level(self, users: int) -> str:
        return f"{self.amount(users):.4g} {self.unit}"


class Machine(Record):
    """Where the load came from; on loopback also where the server ran."""

    cpu_model: str
    cores: int
    memory_gib: float
    system: str


class ProcessorTime(Record):
    """CPU time over the measured window. The server's is known when it runs on this machine under the same user."""

    client_seconds: float
    client_cores: float  # cores that the load generator kept busy; one process has no more than 1
    client_late_p99_ms: float | None = None  # how late its timers rang: any moment that it noted may be so late
    server_seconds: float | None
    server_share: float | None  # of all cores of the machine, 0..1


class Stopped(Record):
    """The run was stopped before its planned end, so the report is of a part of it."""

    planned_s: int
    measured_s: int
    under_way: int  # requests started in the window that had not ended: they are in no figure


class Judgement(Record):
    """One limit. `seen` has the unit of the limit; None: nothing was seen, or a failure stands there."""

    name: str  # as the spec has it; `answered`: no spec says it, and no figure means anything without
    bound: Literal["at most", "at least"]
    limit: float
    seen: float | None
    met: bool
    said: str  # a sentence
    thin: str = ""  # that the percentile rests on too few samples


class Few(Record):
    """A percentile of fewer samples than it takes (`samples_for`)."""

    seen: int
    needed: int


class LoadReport(Record):
    """Everything that a reader needs to trust, compare or repeat the figures."""

    format: Literal["trireme-load-report-1"] = FORMAT
    started_at: str  # UTC, ISO 8601
    spec_name: str
    identity: Identity
    proof: tuple[ProofFigure, ...] = ()  # on the server's machine, before it was ready
    load: Load
    figures: Figures
    by_protocol: dict[str, Figures]
    steps: tuple[Step, ...]
    points: tuple[Point, ...]
    interval_s: int
    stopped: Stopped | None = None  # None: it went to its planned end
    slo: tuple[Judgement, ...] | None = None  # None: it was held to no limits
    intervals: dict[str, Interval] = Field(default_factory=dict)  # 95 %, by figure
    few: dict[str, Few] = Field(default_factory=dict)  # percentiles of too few samples, by figure
    curves: dict[str, tuple[float, ...]] = Field(default_factory=dict)  # of a generator: ms at CURVE_PERCENTS
    error_examples: dict[str, str]
    models: tuple[ModelStatistics, ...]
    generator: GeneratorStatistics | None = None
    ledger: Ledger | None = None
    requests: RequestLedger | None = None
    processor: ProcessorTime
    machine: Machine
    tools: dict[str, str]  # name -> version
    notes: tuple[str, ...]  # what a reader must know before trusting the figures
    percentile_error: float = PERCENTILE_ERROR  # relative, at most

    @property
    def measured_s(self) -> int:
        return len(self.points) * self.interval_s

    def save(self, path: Path) -> None:
        path.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")


def read_report(path: Path) -> LoadReport:
    """Raises LoadInputError: no such file, not JSON, not a load report, or one of another release."""
    fix = "give a file that `trireme loadtest` wrote"
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text)
    except (OSError, ValueError) as error:
        got = (error.strerror or str(error)) if isinstance(error, OSError) else f"text that is not JSON ({error})"
        raise LoadInputError(f"report {path}", got=got, expected="a load report in JSON", fix=fix) from error
    found = data.get("format") if isinstance(data, dict) else None
    if found != FORMAT:
        got = f"format {found!r}" if found else "JSON without the key `format`"
        raise LoadInputError(f"report {path}", got=got, expected=f"format {FORMAT!r}", fix=fix)
    try:
        return LoadReport.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        got = f"{key}: {first['msg']}"
        raise LoadInputError(f"report {path}", got=got, expected=f"the keys of {FORMAT!r}", fix=fix) from error
