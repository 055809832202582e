"""Sections run one after the other, each in a process of its own with a time limit.

A section that raises, hangs or takes its process down is written down with its reason, and the next one begins: a CUDA
fault spoils a whole process, and two flavours of TensorRT do not fit into one. Rows cross a pipe as they are measured,
so that what was measured before a fault is kept.
"""

from __future__ import annotations

import importlib
import multiprocessing
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from builders.errors import MachineError, UnsupportedError
from builders.gpu_proof.record import Row, Section, Status
from builders.gpu_proof.roofline import Limits
from builders.gpu_proof.setting import Budget, NotRun, Setting

GRACE_S = 10.0  # for the case under way when a section's time is over
_END_S = 5.0  # from asking a process to end to ending it
# Imported once by the server that sections are forked from: none of them wakes CUDA by being imported.
_PRELOADED = ["torch", "transformers.models.bert.modeling_bert", "transformers.models.llama.modeling_llama", "onnx"]
_OURS = ("builders", "runtime")
_STATUS: dict[str, Status] = {"done": "ran", "not run": "not run"}


@dataclass(frozen=True)
class Part:
    """A section to run. It gets at most `most_s`, and is not begun with less than `least_s` left of the budget.

    `module`.`function`(setting, limits, budget, **arguments) yields its rows. It is imported in its own process, so
    that a package which a machine lacks costs the sections that need it, and no other.
    """

    name: str
    module: str
    most_s: float
    least_s: float = 5.0
    function: str = "measure"
    arguments: Mapping[str, str] = field(default_factory=dict)


def run_parts(
    parts: Sequence[Part], setting: Setting, budget: Budget, report: Callable[[Section], None] = lambda section: None
) -> tuple[Section, ...]:
    """One section a part, in order. Never raises for what happens inside one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    done: list[Section] = []
    for part in parts:
        left = budget.left_s
        if left < part.least_s:
            section = Section(part.name, "not run", f"time: {max(left, 0):.0f} s of the budget were left", 0.0)
        else:
            section = _run(context, part, setting, Limits.of(done), min(left, part.most_s))
        done.append(section)
        report(section)
    return tuple(done)


def _run(context: Any, part: Part, setting: Setting, limits: Limits | None, seconds: float) -> Section:
    began = time.monotonic()
    budget = Budget(began + seconds)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=measure_here, args=(part, setting, limits, budget, sender))
    rows: list[Row] = []
    try:
        process.start()
        sender.close()  # this end; the process holds the other, and its death is the end of the pipe
        kind, reason = _collect(receiver, rows, budget.deadline + GRACE_S)
    finally:
        _end(process)
        receiver.close()
    if kind == "died":
        reason = f"its process ended with exit code {process.exitcode}"
    return Section(part.name, _STATUS.get(kind, "failed"), reason, time.monotonic() - began, tuple(rows))


def _collect(receiver: Connection, rows: list[Row], deadline: float) -> tuple[str, str]:
    """Rows until the section says how it ended; "died" where it did not."""
    while True:
        if not receiver.poll(max(0.0, deadline - time.monotonic())):
            return "late", "it did not end in its time, and was ended"
        try:
            kind, content = receiver.recv()
        except EOFError:
            return "died", ""
        if kind != "row":
            return kind, content
        rows.append(content)


def _end(process: Any) -> None:
    if process.pid is None:  # it was never started
        return
    process.join(_END_S)
    for stop in (process.terminate, process.kill):
        if process.is_alive():
            stop()
            process.join(_END_S)


def measure_here(part: Part, setting: Setting, limits: Limits | None, budget: Budget, sender: Connection) -> None:
    """What a section's process does. What it lacks is "not run"; anything else that is raised has failed."""
    try:
        measure = getattr(importlib.import_module(part.module), part.function)
        for row in measure(setting, limits, budget, **part.arguments):
            sender.send(("row", row))
        end = ("done", "")
    except (NotRun, MachineError, UnsupportedError) as error:
        end = ("not run", str(error))
    except Exception as error:  # noqa: BLE001 - the other sections go on, and the result shows this one
        absent = error.name or "" if isinstance(error, ModuleNotFoundError) else ""
        if absent and absent.split(".")[0] not in _OURS:
            end = ("not run", f"no module {absent}")
        else:
            traceback.print_exc()
            end = ("failed", f"{type(error).__name__}: {error}")
    sender.send(end)
    sender.close()
