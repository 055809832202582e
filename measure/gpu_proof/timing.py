"""Seconds of a call, on the device's clock or the host's; and cases one after the other, as long as there is time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from statistics import median
from typing import Any

from measure.gpu_proof.record import Row
from measure.gpu_proof.setting import NotRun, Setting

MOST_CALLS = 200
_WARM_CALLS = 2  # the first ones load modules, choose kernels and fill allocators
Case = tuple[Row, Callable[[Row], Row]]


def in_time(setting: Setting, cases: Iterable[Case], least_s: float = 0.0) -> Iterator[Row]:
    """Each row as its function measures it. It says so where that raises NotRun, and "time" where the section has not
    twice the longest case's time left, or less than `least_s` (the dry run's cases are short).
    """
    longest = 0.0 if setting.dry else least_s / 2
    for row, measure in cases:
        began = time.monotonic()
        if setting.left_s < 2 * longest:
            found = replace(row, reason="time")
        else:
            try:
                found = measure(row)
            except NotRun as refused:
                found = replace(row, reason=str(refused))
        longest = max(longest, time.monotonic() - began)
        yield found


def device_seconds(call: Callable[[], object], setting: Setting) -> float:
    """Median time of a call that leaves its work on the device's stream."""
    if setting.device == "cpu":
        return host_seconds(call, setting)
    import torch

    event: Any = torch.cuda.Event

    def once() -> float:
        start, end = event(enable_timing=True), event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    return _median(once, setting)


def host_seconds(call: Callable[[], object], setting: Setting) -> float:
    """Median time of a call that returns when its work is done."""

    def once() -> float:
        started = time.perf_counter()
        call()
        return time.perf_counter() - started

    return _median(once, setting)


def _median(once: Callable[[], float], setting: Setting) -> float:
    """At least `least_calls`, then until `most_seconds` are over or `MOST_CALLS` are done."""
    for _ in range(_WARM_CALLS):
        once()
    times: list[float] = []
    began = time.monotonic()
    while len(times) < MOST_CALLS:
        times.append(once())
        if len(times) >= setting.least_calls and time.monotonic() - began > setting.most_seconds:
            break
    return median(times)
