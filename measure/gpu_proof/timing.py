"""How long a call takes on the device, and what is said of a case that cannot be measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from builders.errors import MachineError, UnsupportedError
from measure.gpu_proof.record import Measured
from measure.gpu_proof.setting import Setting

_OURS = ("builders", "measure", "runtime")
Case = tuple[Measured, Callable[[Measured], Iterable[Measured]]]


class NotRun(Exception):
    """A section or a case that this machine cannot run. The message is the reason that the result shows."""


def lacking(error: Exception) -> str:
    """What this machine lacks, by what was raised for it; empty where something is broken."""
    if isinstance(error, NotRun | MachineError | UnsupportedError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and error.name and error.name.split(".")[0] not in _OURS:
        return f"no module {error.name}"
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which may not be here
        return f"does not fit the memory: {str(error).partition('. ')[0]}"
    return ""


def in_time(setting: Setting, cases: Iterable[Case], least_s: float = 0.0) -> Iterator[Measured]:
    """What each case's function makes of its row. The row alone, with the reason, where the machine lacks what that
    needs, or where the section has not twice the longest case's time left, or less than `least_s` (the dry run's cases
    are short).
    """
    longest = 0.0 if setting.dry else least_s / 2
    for row, measure in cases:
        began = time.monotonic()
        if setting.left_s < 2 * longest:
            yield replace(row, reason="time")
            continue
        try:
            yield from measure(row)
        except Exception as error:
            if not (reason := lacking(error)):
                raise
            yield replace(row, reason=reason)
        longest = max(longest, time.monotonic() - began)


def captured(step: Callable[[], Any], setting: Setting) -> Callable[[], Any]:
    """Launches `step` as one CUDA graph, and gives what lies where its result will be. On a CPU, the step itself."""
    if setting.dry:
        return step
    import torch

    for _ in range(3):  # compiled and warm: a capture allows neither
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = step()

    def launch() -> Any:
        graph.replay()
        return made

    return launch


def seconds_of(call: Callable[[], object], setting: Setting, *, calls: int = 0) -> float:
    """Median time of a call whose work may be left on the device: many follow each other, and the device is waited for
    behind them. `calls`: as many, where several processes must make the same number.
    """
    from torch.utils.benchmark import Timer

    call()  # loads modules and chooses kernels: the timer would take it for the length of a call
    timer = Timer("call()", globals={"call": call})
    return timer.timeit(calls).median if calls else timer.blocked_autorange(min_run_time=setting.timing_s).median
