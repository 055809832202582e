"""From what a run left behind to its report."""

from __future__ import annotations

import math
import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from loadtest.counters import generator_between, statistics_between
from loadtest.errors import LoadRunError
from loadtest.figures import Counted, Figures, figures_of, measured_keys, merged, points_of, steps_of
from loadtest.histogram import CURVE_PERCENTS, LatencyHistogram, union
from loadtest.interface import TOKEN_COUNT, TRUNCATED
from loadtest.recording import Cell
from loadtest.report import Load, LoadReport, Machine, Processor
from loadtest.server import Identity, Snapshot
from loadtest.texts import digest_texts

if TYPE_CHECKING:
    from loadtest.run import Evidence, LoadPlan

LATE = 0.1  # of what is measured: above it, the lateness of the generator's own timers matters
BUSY = 0.9  # of the cores that the generator can use: above it, the figures are partly its own


def report_from_evidence(evidence: Evidence, spec_name: str) -> LoadReport:
    """Raises LoadRunError when no request at all was started in the measured window."""
    plan, trace = evidence.plan, evidence.trace
    keys = measured_keys(trace, plan.schedule)
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
        raise LoadRunError(
            f"no request ended in {seconds} measured seconds; use a longer duration or a shorter timeout"
        )
    late = union(histogram for key, histogram in trace.late.items() if key in keys)
    processor = _processor(evidence.before, evidence.after, late)
    return LoadReport(
        started_at=datetime.fromtimestamp(trace.started_at, UTC).isoformat(timespec="seconds"),
        spec_name=spec_name,
        identity=evidence.after.identity or evidence.before.identity or Identity(model=plan.model),
        load=_load(plan, evidence.texts),
        figures=whole,
        by_protocol={protocol: figures_of(cells, seconds, counted) for protocol, cells in measured.items()},
        steps=steps_of(trace, plan.schedule, counted),
        points=points_of(trace, keys, counted),
        curves=_curves(everything),
        interval_s=trace.interval_s,
        error_examples={kind: text for kind, text in sorted(trace.examples.items()) if kind in whole.errors},
        models=statistics_between(evidence.before.statistics, evidence.after.statistics),
        generator=generator_between(evidence.before.generator, evidence.after.generator),
        ledger=evidence.ledger,
        processor=processor,
        machine=this_machine(),
        tools={"triton": evidence.target.triton_version, **_tools()},
        notes=(*_notes(evidence), *_notes_on_client(evidence, whole, processor), *_notes_on_ledger(evidence)),
    )


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
        **plan.model_dump(include=set(Load.model_fields) - {"texts_file"}),
    )


def _notes(evidence: Evidence) -> list[str]:
    before, after = evidence.before, evidence.after
    notes = list(dict.fromkeys([*before.faults, *after.faults]))
    if before.identity is None and after.identity is None:
        notes.append("the service does not name its weights (metric trireme_model_info is missing)")
    elif before.identity is None or after.identity is None:
        when = "end" if after.identity is None else "start"
        notes.append(f"the service did not name its weights at the {when} of the window")
    elif before.identity != after.identity:
        old, new = before.identity, after.identity
        notes.append(
            "the service named other weights at the end than at the start, so the figures belong to no single version: "
            f"version {old.version} {old.digest[:16]}, then version {new.version} {new.digest[:16]}"
        )
    return notes


def _notes_on_client(evidence: Evidence, whole: Figures, processor: Processor) -> list[str]:
    """Where the load generator itself may be what was measured."""
    notes = []
    if processor.client_cores > BUSY * min(evidence.plan.processes, os.cpu_count() or 1):
        notes.append(
            f"the load generator kept {processor.client_cores:.2f} cores busy with {evidence.plan.processes} "
            "process(es), so latency and throughput are partly its own; use more processes, or another machine"
        )
    measured = whole.p50_ms if whole.stream is None else whole.stream.gap.p99_ms
    late = processor.client_late_p99_ms
    if late is not None and measured is not None and late > LATE * measured:
        what = "p50 latency" if whole.stream is None else "p99 of the gaps between tokens"
        notes.append(
            f"the load generator came to its work up to {late:.3g} ms late (p99), and {what} is {measured:.3g} ms: "
            "part of it may be the generator's own; give it cores that the server does not use"
        )
    lost = sum(evidence.trace.users.get(key) is None for key in measured_keys(evidence.trace, evidence.plan.schedule))
    if lost:
        notes.append(f"{lost} interval(s) have no sample of the number of users: the load generator was late")
    return notes


def _notes_on_ledger(evidence: Evidence) -> list[str]:
    ledger = evidence.ledger
    if ledger is None or 0 <= ledger.made_tokens - ledger.received_tokens <= ledger.owed_tokens:
        return []
    return [
        f"the server counts {ledger.made_tokens} tokens over the whole run, {ledger.received_tokens} came, and streams "
        f"that failed or were left lack {ledger.owed_tokens} at most: others used the server too, or its counters lag"
    ]


def _processor(before: Snapshot, after: Snapshot, late: LatencyHistogram) -> Processor:
    seconds = max(after.at - before.at, math.ulp(1.0))
    client_s = max(0.0, after.client_cpu_s - before.client_cpu_s)
    server_s = None
    if before.server_cpu_s is not None and after.server_cpu_s is not None:
        server_s = max(0.0, after.server_cpu_s - before.server_cpu_s)
    return Processor(
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
