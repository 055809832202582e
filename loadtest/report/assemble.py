"""From what a run left behind to its report."""

from __future__ import annotations

import math
import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from loadtest.errors import LoadRunError
from loadtest.report.notes import notes_of
from loadtest.report.record import Load, LoadReport, Machine, ProcessorTime, Stopped
from loadtest.report.rows import few_of, intervals_by_line
from loadtest.requests.interface import TOKEN_COUNT, TRUNCATED
from loadtest.requests.texts import digest_texts
from loadtest.seen.counters import generator_between, statistics_between
from loadtest.seen.figures import Counted, Figures, figures_of, measured_keys, merged, plateaux_of, points_of, steps_of
from loadtest.seen.histogram import CURVE_PERCENTS, LatencyHistogram, union
from loadtest.seen.intervals import Interval, blocks_of, resampled, widening
from loadtest.seen.recording import Cell, Trace
from loadtest.seen.server import Identity, Snapshot

if TYPE_CHECKING:
    from loadtest.plan import Evidence, LoadPlan


def report_from_evidence(evidence: Evidence, spec_name: str) -> LoadReport:
    """Raises LoadRunError when no request at all ended, or the run was stopped before the first measured second."""
    plan, trace = evidence.plan, evidence.trace
    keys = measured_keys(trace, plan.schedule)
    if not keys:
        raise LoadRunError(
            f"the load test was stopped within its warm-up of {plan.warm_up_s} s, before a whole second was measured; "
            "there is nothing to report. Let it run for longer, or give a shorter --warm-up-s"
        )
    measured = {
        protocol: [cell for key, cell in cells.items() if key in keys]
        for protocol, cells in sorted(trace.cells.items())
    }
    interface = evidence.target.interface
    counts = interface.counts if interface is not None else ()
    counted = Counted(TOKEN_COUNT in counts, TRUNCATED in counts, stream=interface is None)
    seconds = len(keys) * trace.interval_s
    everything = merged(cell for cells in measured.values() for cell in cells)
    whole = figures_of([everything], seconds, counted)
    if whole.ended == 0:
        raise _nothing_ended(plan, everything, seconds)
    late = union(histogram for key, histogram in trace.late.items() if key in keys)
    processor = _processor(evidence.before, evidence.after, late)
    return LoadReport(
        started_at=datetime.fromtimestamp(trace.started_at, UTC).isoformat(timespec="seconds"),
        spec_name=spec_name,
        identity=evidence.after.identity or evidence.before.identity or Identity(model=plan.model),
        proof=evidence.after.proof or evidence.before.proof,
        load=_load(plan, evidence.texts),
        figures=whole,
        by_protocol={protocol: figures_of(cells, seconds, counted) for protocol, cells in measured.items()},
        steps=steps_of(trace, plan.schedule, counted),
        points=points_of(trace, keys, counted),
        curves=_curves(everything),
        interval_s=trace.interval_s,
        stopped=_stopped(plan, trace, whole, everything.started, seconds),
        intervals=_intervals(evidence, counted, whole),
        few=few_of(whole),
        error_examples={kind: text for kind, text in sorted(trace.examples.items()) if kind in whole.errors},
        models=statistics_between(evidence.before.statistics, evidence.after.statistics),
        generator=generator_between(evidence.before.generator, evidence.after.generator),
        ledger=evidence.ledger,
        requests=evidence.requests,
        processor=processor,
        machine=this_machine(),
        tools={"triton": evidence.target.triton_version, **_tools()},
        notes=notes_of(evidence, whole, processor),
    )


def _nothing_ended(plan: LoadPlan, seen: Cell, seconds: int) -> LoadRunError:
    waiting = "none was started, so the load generator did not get to its work; use fewer users or more --processes"
    if seen.started:
        waiting = (
            f"{seen.started} were started and wait still, so the server does not answer; use fewer users, a longer "
        )
        waiting += "--duration-s or a shorter --timeout-s, and look at the server's log"
    return LoadRunError(f"no request ended in {seconds} measured seconds with {plan.users} users: {waiting}")


def _stopped(plan: LoadPlan, trace: Trace, whole: Figures, started: int, seconds: int) -> Stopped | None:
    if trace.stopped_at is None or seconds >= plan.duration_s // trace.interval_s * trace.interval_s:
        return None
    return Stopped(planned_s=plan.duration_s, measured_s=seconds, under_way=max(0, started - whole.ended))


def _intervals(evidence: Evidence, counted: Counted, whole: Figures) -> dict[str, Interval]:
    trace, cells = evidence.trace, dict[int, Cell]()
    for of_protocol in trace.cells.values():
        for key, cell in of_protocol.items():
            cells.setdefault(key, Cell()).merge(cell)
    plateaux = plateaux_of(trace, evidence.plan.schedule)
    strata = [blocks_of(cells, keys, trace.interval_s) for keys in plateaux if keys]
    return intervals_by_line(whole, resampled(strata, counted), widening(strata))


def _curves(cell: Cell) -> dict[str, tuple[float, ...]]:
    """Of a generator, the distributions that are drawn."""
    if cell.stream is None:
        return {}
    named = {"first_token": cell.stream.first_token, "gap": cell.stream.gap}
    return {name: histogram.percentiles(CURVE_PERCENTS) for name, histogram in named.items() if histogram.counts}


def _load(plan: LoadPlan, texts: tuple[str, ...]) -> Load:
    return Load(
        texts_file=plan.texts_file.name,
        texts_digest=digest_texts(texts),
        texts_lines=len(texts),
        gateway=plan.gateway is not None,
        **plan.model_dump(include=set(Load.model_fields) - {"texts_file", "gateway"}),
    )


def _processor(before: Snapshot, after: Snapshot, late: LatencyHistogram) -> ProcessorTime:
    seconds = max(after.at - before.at, math.ulp(1.0))
    client_s = max(0.0, after.client_cpu_s - before.client_cpu_s)
    server_s = None
    if before.server_cpu_s is not None and after.server_cpu_s is not None:
        server_s = max(0.0, after.server_cpu_s - before.server_cpu_s)
    return ProcessorTime(
        client_seconds=client_s,
        client_cores=client_s / seconds,
        client_late_p99_ms=late.percentile(99),
        server_seconds=server_s,
        server_share=None if server_s is None else server_s / seconds / (os.cpu_count() or 1),
    )


def this_machine() -> Machine:
    import psutil

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return Machine(
        cpu_model=names[0] if names else platform.processor() or platform.machine(),
        cores=os.cpu_count() or 1,
        memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
        system=platform.platform(terse=True),
    )


def _tools() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("trireme", "locust", "tritonclient", "grpcio"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found
