"""What the server counted itself, as differences of its counters: Triton of its models, a generator of its steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runtime.prometheus import metric_lines
from runtime.record import Record

# Triton's statistics as JSON, by (model, version)
Counters = Mapping[tuple[str, str], Mapping[str, Any]]


class ModelStatistics(Record):
    """Triton's own statistics of one model over the measured window."""

    model: str
    version: str
    requests: int
    failed_requests: int
    executions: int
    batch_sizes: dict[int, int]  # texts in one execution -> executions; empty for an ensemble, which only passes on
    mean_batch: float | None  # texts in one execution
    request_ms: float | None  # mean over requests: from arrival to answer, queue included
    queue_ms: float | None  # mean over requests
    compute_ms: float | None  # mean over executions, of batches of every size


class GeneratorStatistics(Record):
    """A generator's own counters over the measured window; they reach its metrics page once a second."""

    requests: int  # that got their first token
    prompt_tokens: int
    reused_tokens: int  # of them: found in the cache
    output_tokens: int
    steps: int
    tokens_per_step: float | None
    step_ms: float | None  # mean
    executor_ms: float | None  # of a step: the model itself, mean
    first_token_ms: float | None  # mean, from arrival in the server
    gap_ms: float | None  # mean, between tokens of one stream


class Ledger(Record):
    """Over the whole run, from the first request to the last: every token that was made came, or was still owed."""

    received_tokens: int  # by the load generator, those of streams that failed or were left included
    made_tokens: int  # as the server counts
    owed_tokens: int  # asked for, and not received, of streams that failed or were left: some of them may be made


class RequestLedger(Record):
    """Over the whole run, warm-up and drain included: every request that was started, and what became of it.

    `started` = `answered` + all of `failed` + `left` + `under_way`.
    """

    started: int
    answered: int
    failed: dict[str, int]
    left: int  # of a generator: their client hung up, as it was asked to
    under_way: int  # the load generator ended before they did
    server_succeeded: int | None = None  # as the server counts in the same time; None: it does not say, or a generator
    server_failed: int | None = None  # Triton 2.51 counts a failed request of an ensemble twice
    probes: int = 0  # at most: requests of the server's own readiness probes in that time


def statistics_between(before: Counters, after: Counters) -> tuple[ModelStatistics, ...]:
    """One record for each model and version that was asked for in between. A model loaded anew counts from zero."""
    records = []
    for (model, version), late in after.items():
        early = before.get((model, version), {})
        if _count(early, "success") > _count(late, "success"):
            early = {}
        requests, failed = (_count(late, part) - _count(early, part) for part in ("success", "fail"))
        if requests == failed == 0:
            continue
        batch_sizes, compute_ns = _executions(early, late)
        executions = sum(batch_sizes.values())
        records.append(
            ModelStatistics(
                model=model,
                version=version,
                requests=requests,
                failed_requests=failed,
                executions=executions,
                batch_sizes=batch_sizes,
                mean_batch=sum(size * n for size, n in batch_sizes.items()) / executions if executions else None,
                request_ms=_mean_ms(early, late, "success"),
                queue_ms=_mean_ms(early, late, "queue"),
                compute_ms=compute_ns / executions / 1e6 if executions else None,
            )
        )
    return tuple(records)


def _executions(early: Mapping[str, Any], late: Mapping[str, Any]) -> tuple[dict[int, int], int]:
    """Executions by batch size, and the nanoseconds of all of them."""
    old = {int(batch["batch_size"]): batch for batch in early.get("batch_stats", [])}
    sizes, compute_ns = {}, 0
    for batch in sorted(late.get("batch_stats", []), key=lambda batch: int(batch["batch_size"])):
        size = int(batch["batch_size"])
        count = _part(batch, "compute_infer", "count") - _part(old.get(size, {}), "compute_infer", "count")
        if count:
            sizes[size] = count
            for part in ("compute_input", "compute_infer", "compute_output"):
                compute_ns += _part(batch, part, "ns") - _part(old.get(size, {}), part, "ns")
    return sizes, compute_ns


def _mean_ms(early: Mapping[str, Any], late: Mapping[str, Any], part: str) -> float | None:
    count = _count(late, part) - _count(early, part)
    return (_count(late, part, "ns") - _count(early, part, "ns")) / count / 1e6 if count else None


def _count(entry: Mapping[str, Any], part: str, unit: str = "count") -> int:
    return _part(entry.get("inference_stats", {}), part, unit)


def _part(entry: Mapping[str, Any], part: str, unit: str) -> int:
    return int(entry.get(part, {}).get(unit, 0))  # JSON of protobuf: 64-bit integers are strings, zeros are left out


def generator_counters(page: str, model: str) -> dict[str, float]:
    """The counters `trireme_generation_…` of a model in Prometheus text, by the rest of their names; versions add up.

    Buckets of histograms are left out. Empty: the model is no generator of ours, or it is not there.
    """
    found: dict[str, float] = {}
    for name, labels, value in metric_lines(page, "trireme_generation_"):
        if labels.get("model") == model and "le" not in labels:
            found[name] = found.get(name, 0.0) + value
    return found


def generator_between(
    before: Mapping[str, float] | None, after: Mapping[str, float] | None
) -> GeneratorStatistics | None:
    """None where the server shows no such counters, or where they could not be read (None) at either end.

    A model loaded anew counts from zero.
    """
    if before is None or not after:
        return None
    early = before if before.get("steps_total", 0) <= after.get("steps_total", 0) else {}

    def gained(name: str) -> float:
        return after.get(name, 0.0) - early.get(name, 0.0)

    def mean_ms(total: str, count: str) -> float | None:
        return gained(total) / gained(count) * 1000 if gained(count) else None

    steps, tokens = gained("steps_total"), gained("output_tokens_total")
    return GeneratorStatistics(
        requests=int(gained("requests_total")),
        prompt_tokens=int(gained("prompt_tokens_total")),
        reused_tokens=int(gained("reused_tokens_total")),
        output_tokens=int(tokens),
        steps=int(steps),
        tokens_per_step=tokens / steps if steps else None,
        step_ms=mean_ms("step_seconds_total", "steps_total"),
        executor_ms=mean_ms("executor_seconds_total", "steps_total"),
        first_token_ms=mean_ms("time_to_first_token_seconds_sum", "time_to_first_token_seconds_count"),
        gap_ms=mean_ms("inter_token_seconds_sum", "inter_token_seconds_count"),
    )
