"""`LoadReport`: what one load test saw, and of which weights on which machine. Kept as JSON; judged; drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal, Protocol

from pydantic import Field, ValidationError

from loadtest.counters import GeneratorStatistics, Ledger, ModelStatistics
from loadtest.errors import LoadInputError
from loadtest.figures import Figures, Point, Record, Step
from loadtest.histogram import PERCENTILE_ERROR
from loadtest.prompts import StreamLoad
from loadtest.server import Identity

FORMAT: Literal["trireme-load-report-1"] = "trireme-load-report-1"


class Load(Record):
    """The load that was asked for."""

    protocol: Literal["grpc", "http", "both"]
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


class Processor(Record):
    """CPU time over the measured window. The server's is known when it runs on this machine under the same user."""

    client_seconds: float
    client_cores: float  # cores that the load generator kept busy; one process has no more than 1
    client_late_p99_ms: float | None = None  # how late its timers rang: any moment that it noted may be so late
    server_seconds: float | None
    server_share: float | None  # of all cores of the machine, 0..1


class LoadReport(Record):
    """Everything that a reader needs to trust, compare or repeat the figures."""

    format: Literal["trireme-load-report-1"] = FORMAT
    started_at: str  # UTC, ISO 8601
    spec_name: str
    identity: Identity
    load: Load
    figures: Figures
    by_protocol: dict[str, Figures]
    steps: tuple[Step, ...]
    points: tuple[Point, ...]
    interval_s: int
    curves: dict[str, tuple[float, ...]] = Field(default_factory=dict)  # of a generator: ms at CURVE_PERCENTS
    error_examples: dict[str, str]
    models: tuple[ModelStatistics, ...]
    generator: GeneratorStatistics | None = None
    ledger: Ledger | None = None
    processor: Processor
    machine: Machine
    tools: dict[str, str]  # name -> version
    notes: tuple[str, ...]  # what a reader must know before trusting the figures
    percentile_error: float = PERCENTILE_ERROR  # relative, at most

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


class Limits(Protocol):
    """What a load test must show. The spec's slice `slo` has these, and so can any record."""

    @property
    def p95_latency_ms(self) -> float | None: ...
    @property
    def min_throughput_per_s(self) -> float | None: ...
    @property
    def max_error_rate(self) -> float: ...


class StreamLimits(Protocol):
    """What a generator's load test must show beside `Limits`."""

    @property
    def p99_first_token_ms(self) -> float | None: ...
    @property
    def p99_inter_token_ms(self) -> float | None: ...
    @property
    def min_output_tokens_per_s(self) -> float | None: ...


def check_slo(report: LoadReport, limits: Limits) -> list[str]:
    """One sentence for each value that was missed; empty: all were met. Throughput is in texts, a generator's in
    requests; its latency is that of a whole answer.

    For the shape `steps` the whole ramp is judged, its last plateau included.
    """
    seen, missed = report.figures, []
    if seen.ended == seen.failed:
        missed.append(f"No request was answered in {report.load.duration_s} s; {seen.failed} failed.")
    elif limits.p95_latency_ms is not None:
        missed += _over("p95 latency", seen.p95_ms, limits.p95_latency_ms)
    if limits.min_throughput_per_s is not None:
        unit = "texts/s" if seen.stream is None else "requests/s"
        missed += _under("Throughput", seen.texts_per_s, limits.min_throughput_per_s, unit)
    if seen.error_rate > limits.max_error_rate:
        kinds = ", ".join(f"{count} {kind}" for kind, count in seen.errors.items())
        missed.append(
            f"Error rate is {seen.error_rate:.4%} ({seen.failed} of {seen.ended} requests: {kinds}), "
            f"over the limit of {limits.max_error_rate:.4%}."
        )
    return missed


def check_stream_slo(report: LoadReport, limits: StreamLimits) -> list[str]:
    """The same for what a generator's report alone has. A limit on times that nothing was seen of is missed."""
    seen, missed = report.figures.stream, list[str]()
    if seen is None:
        return missed
    if limits.p99_first_token_ms is not None:
        missed += _over("p99 of the time to the first token", seen.first_token.p99_ms, limits.p99_first_token_ms)
    if limits.p99_inter_token_ms is not None:
        missed += _over("p99 of the gaps between tokens", seen.gap.p99_ms, limits.p99_inter_token_ms)
    if limits.min_output_tokens_per_s is not None:
        missed += _under("Output", seen.output_tokens_per_s, limits.min_output_tokens_per_s, "tokens/s")
    return missed


def _over(name: str, seen_ms: float | None, limit_ms: float) -> list[str]:
    if seen_ms is None:
        return [f"{name} is unknown, because nothing was seen; the limit is {limit_ms:g} ms."]
    if seen_ms <= limit_ms:
        return []
    return [f"{name} is {seen_ms:.4g} ms, which is {seen_ms / limit_ms:.2f} times the limit of {limit_ms:g} ms."]


def _under(name: str, seen: float, least: float, unit: str) -> list[str]:
    if seen >= least:
        return []
    return [f"{name} is {seen:.4g} {unit}, which is {seen / least:.2f} times the required {least:g} {unit}."]


def render_text(report: LoadReport) -> str:
    """A summary for a terminal: at most 80 characters wide where the names allow."""
    from loadtest.summary import render

    return render(report)


def render_html(report: LoadReport, baseline: LoadReport | None = None) -> str:
    """One self-contained page, light and dark. With `baseline`, an earlier report, figures stand side by side."""
    from loadtest.page import render

    return render(report, baseline)
