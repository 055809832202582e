"""What was asked for against what came, over a whole run: requests of every model, tokens of a generator."""

from __future__ import annotations

import http.client
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

from loadtest.plan import Evidence, LoadPlan
from loadtest.seen.counters import Ledger, RequestLedger, generator_counters
from loadtest.seen.figures import merged
from loadtest.seen.recording import StreamCell
from loadtest.seen.server import request_counts
from runtime.prometheus import fetch

T = TypeVar("T")

COUNT_LIMIT_S = 3.0  # for a server to publish its last counts: a generator does so once a second


@dataclass(frozen=True)
class Counts:
    """The server's own, before a run. None: it does not say."""

    at: float  # time.monotonic()
    requests: tuple[int, int] | None  # answered, failed
    tokens: float | None


def counts_before(plan: LoadPlan) -> Counts:
    # Triton counts a stream's responses, not its requests
    requests = request_counts(plan.grpc_address, plan.model) if plan.stream is None else None
    return Counts(time.monotonic(), requests, made_tokens(plan.metrics_address, plan.model))


def with_ledgers(evidence: Evidence, before: Counts) -> Evidence:
    whole = merged(cell for cells in evidence.trace.cells.values() for cell in cells.values())
    stream = whole.stream or StreamCell()
    ended = whole.latency.count + sum(whole.errors.values()) + stream.cancelled
    requests = RequestLedger(
        started=whole.started,
        answered=whole.latency.count,
        failed=dict(sorted(whole.errors.items())),
        left=stream.cancelled,
        under_way=max(0, whole.started - ended),
    )
    if before.requests is not None:
        requests = _with_server(requests, evidence, before, before.requests)
    return replace(evidence, requests=requests, ledger=_tokens(evidence, stream, before.tokens))


def _with_server(seen: RequestLedger, evidence: Evidence, before: Counts, early: tuple[int, int]) -> RequestLedger:
    from runtime.server.supervise import ProbePace

    plan, trials = evidence.plan, evidence.target.trial_requests
    least = early[0] + trials + seen.answered
    late = _awaited(lambda: request_counts(plan.grpc_address, plan.model), lambda counts: counts[0] >= least)
    if late is None or late[0] < early[0]:  # gone, or loaded anew
        return seen
    return seen.model_copy(
        update={
            "server_succeeded": late[0] - early[0] - trials,
            "server_failed": late[1] - early[1],
            "probes": round((time.monotonic() - before.at) / ProbePace().interval_s) + 2,
        }
    )


def _tokens(evidence: Evidence, seen: StreamCell, before: float | None) -> Ledger | None:
    if before is None:
        return None
    plan = evidence.plan
    received = evidence.target.trial_tokens + seen.output_tokens + seen.lost_tokens
    made = _awaited(lambda: made_tokens(plan.metrics_address, plan.model), lambda made: made >= before + received)
    if made is None or made < before:  # gone, or loaded anew
        return None
    return Ledger(received_tokens=received, made_tokens=round(made - before), owed_tokens=seen.owed_tokens)


def _awaited(read: Callable[[], T | None], enough: Callable[[T], bool]) -> T | None:
    """What `read` gives at last: it is asked again until that is enough, COUNT_LIMIT_S long at most."""
    end = time.monotonic() + COUNT_LIMIT_S
    while True:
        found = read()
        if found is None or enough(found) or time.monotonic() >= end:
            return found
        time.sleep(0.1)


def made_tokens(metrics_address: str | None, model: str) -> float | None:
    """Tokens that a generator has made since it was loaded; None where it does not say."""
    try:
        page = fetch(f"http://{metrics_address}/metrics") if metrics_address else ""
    except (OSError, http.client.HTTPException):
        return None
    return generator_counters(page, model).get("output_tokens_total")
