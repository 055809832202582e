"""Triton's own statistics of its models, as differences of its counters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loadtest.figures import Record

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
