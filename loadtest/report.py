"""`LoadReport`: what one load test saw, and of which weights on which machine. Kept as JSON; judged; drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal, Protocol

from pydantic import ValidationError

from loadtest.counters import ModelStatistics
from loadtest.errors import LoadInputError
from loadtest.figures import Figures, Point, Record, Step, knee_of
from loadtest.histogram import PERCENTILE_ERROR
from loadtest.server import UNKNOWN, Identity

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
    texts_file: str  # name only
    texts_digest: str
    texts_lines: int


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
    error_examples: dict[str, str]
    models: tuple[ModelStatistics, ...]
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


def check_slo(report: LoadReport, limits: Limits) -> list[str]:
    """One sentence for each value that was missed; empty: all were met. Throughput is in texts.

    For the shape `steps` the whole ramp is judged, its last plateau included.
    """
    seen, missed = report.figures, []
    if seen.requests == 0:
        missed.append(f"No request was answered in {report.load.duration_s} s; {seen.failed} failed.")
    elif limits.p95_latency_ms is not None and seen.p95_ms is not None and seen.p95_ms > limits.p95_latency_ms:
        missed.append(
            f"p95 latency is {seen.p95_ms:.4g} ms, which is {seen.p95_ms / limits.p95_latency_ms:.2f} times the limit "
            f"of {limits.p95_latency_ms:g} ms."
        )
    least = limits.min_throughput_per_s
    if least is not None and seen.texts_per_s < least:
        missed.append(
            f"Throughput is {seen.texts_per_s:.4g} texts/s, which is {seen.texts_per_s / least:.2f} times the required "
            f"{least:g} texts/s."
        )
    if seen.error_rate > limits.max_error_rate:
        kinds = ", ".join(f"{count} {kind}" for kind, count in seen.errors.items())
        missed.append(
            f"Error rate is {seen.error_rate:.4%} ({seen.failed} of {seen.failed + seen.requests} requests: {kinds}), "
            f"over the limit of {limits.max_error_rate:.4%}."
        )
    return missed


def render_text(report: LoadReport) -> str:
    """A summary for a terminal: at most 80 characters wide where the names allow."""
    seen, load = report.figures, report.load
    who = f"{report.identity.model} version {report.identity.version} ({report.identity.precision})"
    lines = [
        f"{who}, weights {report.identity.digest[:16]}",
        f"{load.users} users, {load.protocol}, {load.shape}, {load.duration_s} s after {load.warm_up_s} s of warm-up, "
        f"{load.texts_per_request} text(s) a request",
        f"  throughput  {seen.texts_per_s:9.4g} texts/s   {seen.requests_per_s:.4g} requests/s",
        f"  latency     p50 {_ms(seen.p50_ms)}   p95 {_ms(seen.p95_ms)}   p99 {_ms(seen.p99_ms)}"
        f"   max {_ms(seen.max_ms)}",
        f"  errors      {seen.failed} of {seen.failed + seen.requests}"
        + "".join(f"   {kind} {count}" for kind, count in seen.errors.items()),
    ]
    if seen.tokens_per_text is not None:
        cut = f"   truncated {seen.truncated_share:.1%}" if seen.truncated_share is not None else ""
        lines.append(f"  tokens      {seen.tokens_per_text:.4g} a text{cut}")
    for model in report.models:
        batch = "" if model.mean_batch is None else f"   mean batch {model.mean_batch:.3g} in {_ms(model.compute_ms)}"
        lines.append(f"  in Triton   {model.model}: {_ms(model.request_ms)}   queue {_ms(model.queue_ms)}{batch}")
    server = report.processor.server_share
    lines.append(
        f"  CPU         client {report.processor.client_cores:.2f} cores   server "
        + (f"{server * report.machine.cores:.2f} of {report.machine.cores} cores" if server is not None else UNKNOWN)
    )
    if report.steps:
        lines += [
            f"  {step.users:5} users  {step.figures.texts_per_s:9.4g} texts/s   p95 {_ms(step.figures.p95_ms)}"
            for step in report.steps
        ]
        knee = knee_of(report.steps)
        lines.append(f"  knee at {knee.users} users" if knee else "  no knee: nothing was answered")
    return "\n".join(lines + [f"  note: {note}" for note in report.notes])


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g} ms"


def render_html(report: LoadReport, baseline: LoadReport | None = None) -> str:
    """One self-contained page, light and dark. With `baseline`, an earlier report, figures stand side by side."""
    from loadtest.page import render

    return render(report, baseline)
