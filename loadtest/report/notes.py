"""What a reader must know before trusting the figures of a run."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from loadtest.report.rows import number
from loadtest.seen.figures import Figures, measured_keys

if TYPE_CHECKING:
    from loadtest.plan import Evidence
    from loadtest.report.record import ProcessorTime

LATE = 0.1  # of what is measured: above it, the lateness of the generator's own timers matters
STARVED_MS = 500.0  # so late it is starved, whatever is measured
ASKING = 0.95  # of the users, by the start of the window
BUSY = 0.9  # of the cores that the generator can use: above it, the figures are partly its own


def notes_of(evidence: Evidence, whole: Figures, processor: ProcessorTime) -> tuple[str, ...]:
    return (
        *_on_weights(evidence),
        *_on_client(evidence, whole, processor),
        *_on_requests(evidence),
        *_on_tokens(evidence),
    )


def _on_weights(evidence: Evidence) -> list[str]:
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


def _on_client(evidence: Evidence, whole: Figures, processor: ProcessorTime) -> list[str]:
    """Where the load generator itself may be what was measured."""
    notes = []
    if processor.client_cores > BUSY * min(evidence.plan.processes, os.cpu_count() or 1):
        notes.append(
            f"the load generator kept {processor.client_cores:.2f} cores busy with {evidence.plan.processes} "
            "process(es), so latency and throughput are partly its own; use more processes, or another machine"
        )
    measured = whole.p50_ms if whole.stream is None else whole.stream.gap.p99_ms
    late = processor.client_late_p99_ms
    if late is not None and (late > STARVED_MS or (measured is not None and late > LATE * measured)):
        what = "p50 latency" if whole.stream is None else "p99 of the gaps between tokens"
        notes.append(
            f"the load generator came to its work up to {number(late)} ms late (p99), and {what} is "
            f"{'unknown' if measured is None else f'{number(measured)} ms'}: part of it may be the generator's own; "
            "give it cores that the server does not use, more processes, or fewer users"
        )
    notes += _on_users(evidence)
    lost = sum(evidence.trace.users.get(key) is None for key in measured_keys(evidence.trace, evidence.plan.schedule))
    if lost:
        notes.append(f"{lost} interval(s) have no sample of the number of users: the load generator was late")
    return notes


def _on_users(evidence: Evidence) -> list[str]:
    """A load that was never what the report says it was."""
    plan, trace = evidence.plan, evidence.trace
    keys, planned = measured_keys(trace, plan.schedule), plan.schedule.plateaux[0]
    asking = next((trace.users[key] for key in keys if key in trace.users), None)
    if plan.rate_per_s is not None or asking is None or asking >= ASKING * planned:
        return []
    return [
        f"only {asking} of {planned} users had sent their first request when the measured window began: the load "
        "generator had not got to the others; use a longer warm-up, more processes, or fewer users"
    ]


def _on_requests(evidence: Evidence) -> list[str]:
    """What the server answered came here, or failed here, or somebody else had asked."""
    seen = evidence.requests
    if seen is None:
        return []
    notes, failed = [], sum(seen.failed.values())
    if seen.under_way and evidence.trace.stopped_at is None:
        notes.append(f"{seen.under_way} requests had neither been answered nor failed when the load generator ended")
    if seen.server_succeeded is not None:
        spare = seen.server_succeeded - seen.answered
        if not 0 <= spare <= failed + seen.under_way + seen.probes:
            notes.append(
                f"the server counts {seen.server_succeeded} answered requests over the whole run, and {seen.answered} "
                f"came; {failed} that failed here, {seen.under_way} under way and {seen.probes} readiness probes (at "
                "most) do not explain the difference: others used the server too, or its counters lag"
            )
    return notes


def _on_tokens(evidence: Evidence) -> list[str]:
    ledger = evidence.ledger
    if ledger is None or 0 <= ledger.made_tokens - ledger.received_tokens <= ledger.owed_tokens:
        return []
    return [
        f"the server counts {ledger.made_tokens} tokens over the whole run, {ledger.received_tokens} came, and streams "
        f"that failed or were left lack {ledger.owed_tokens} at most: others used the server too, or its counters lag"
    ]
