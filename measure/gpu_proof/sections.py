"""Sections run one after the other, each in a process of its own with a time limit.

A section that raises, hangs or takes its process down is written down with its reason, and the next one begins: a CUDA
fault spoils a whole process, and two flavours of TensorRT do not fit into one. Rows cross a pipe as they are measured,
so that what was measured before a fault is kept.

Sections are forked from a server that imports torch once. That import, minutes from a cold disk, is over before the
budget begins, and a section's clock runs from its own first word.
"""

from __future__ import annotations

import importlib
import multiprocessing
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from builders.errors import MachineError, UnsupportedError
from measure.gpu_proof.record import Row, Section, Status
from measure.gpu_proof.roofline import Limits
from measure.gpu_proof.setting import Budget, NotRun, Setting

START_S = 180.0  # of the server: it imports from a disk that may be cold
BEGIN_S = 60.0  # of a section's process, until its first word
GRACE_S = 10.0  # for the case under way when a section's time is over
_END_S = 5.0  # from asking a process to end to ending it
# Imported once by the server that sections are forked from: none of them wakes CUDA by being imported.
_PRELOADED = ["torch", "transformers.models.bert.modeling_bert", "transformers.models.llama.modeling_llama", "onnx"]
_OURS = ("builders", "measure", "runtime")
_ENDED = "the proof was ended before it was done"
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
    parts: Sequence[Part], setting: Setting, seconds: float, report: Callable[[Section], None] = lambda section: None
) -> tuple[Section, ...]:
    """One section a part, in order, all within `seconds`. Never raises for what happens inside one.

    What ends the whole (a signal) is raised once every part has been reported, with the rows that it has until then.
    Raises MachineError where the server that sections are forked from does not start.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    _start_server(context)
    budget = Budget(time.monotonic() + seconds)
    done: list[Section] = []
    for number, part in enumerate(parts):
        rows: list[Row] = []
        try:
            section = _timed(context, part, setting, budget, done, rows)
            done.append(section)
            report(section)
        except (KeyboardInterrupt, SystemExit):  # also one that comes while a section is reported
            if len(done) == number:
                report(Section(part.name, "not run", _ENDED, 0.0, tuple(rows)))
            for other in parts[number + 1 :]:
                report(Section(other.name, "not run", _ENDED, 0.0))
            raise
    return tuple(done)


def _timed(
    context: Any, part: Part, setting: Setting, budget: Budget, done: Sequence[Section], rows: list[Row]
) -> Section:
    """The section of `part`, or that there was no time for it."""
    left = budget.left_s
    if left < part.least_s:
        return Section(part.name, "not run", f"time: {max(left, 0):.0f} s of the budget were left", 0.0)
    return _run(context, part, setting, Limits.of(done), min(left, part.most_s), rows)


def _start_server(context: Any) -> None:
    """Returns when it has forked an empty process. A server that comes too late finds its owner gone, and ends."""
    ready = threading.Event()

    def fork_one() -> None:  # in a thread, for nothing else bounds the wait for the server's answer
        process = context.Process(target=int)
        process.start()
        ready.set()
        _end(process, _END_S)

    thread = threading.Thread(target=fork_one, daemon=True)
    thread.start()
    thread.join(START_S)
    if not ready.is_set():
        raise MachineError(
            "the process that sections are forked from",
            got=f"it died, or has not imported {', '.join(_PRELOADED)} within {START_S:.0f} s",
            expected="all of them imported",
            fix="import them by hand; what was read from a slow disk is read faster the next time",
        )


def _run(context: Any, part: Part, setting: Setting, limits: Limits | None, seconds: float, rows: list[Row]) -> Section:
    """Appends to `rows` as they come."""
    began = time.monotonic()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=measure_here, args=(part, setting, limits, seconds, sender))
    patience = 0.0  # none where this is ended from outside
    try:
        process.start()
        sender.close()  # this end; the process holds the other, and its death is the end of the pipe
        kind, reason = _collect(receiver, rows, seconds)
        patience = _END_S
    finally:
        _end(process, patience)
        receiver.close()
    if kind == "died":
        reason = f"its process ended with exit code {process.exitcode}"
    return Section(part.name, _STATUS.get(kind, "failed"), reason, time.monotonic() - began, tuple(rows))


def _collect(receiver: Connection, rows: list[Row], seconds: float) -> tuple[str, str]:
    """Rows until the section says how it ended; "died" where it did not. `seconds` count from its first word."""
    deadline, late = time.monotonic() + BEGIN_S, f"its process did not begin within {BEGIN_S:.0f} s, and was ended"
    while True:
        if not receiver.poll(max(0.0, deadline - time.monotonic())):
            return "late", late
        try:
            kind, content = receiver.recv()
        except (EOFError, OSError):  # OSError: in the middle of a row
            return "died", ""
        if kind == "begun":
            deadline, late = time.monotonic() + seconds + GRACE_S, "it did not end in its time, and was ended"
        elif kind == "row":
            rows.append(content)
        else:
            return kind, content


def _end(process: Any, patience: float) -> None:
    if process.pid is None:  # it was never started
        return
    try:
        process.join(patience)
        if process.is_alive():
            process.terminate()
            process.join(_END_S)
    finally:  # also where a signal ends the waiting
        process.kill()
        process.join(_END_S)


def measure_here(part: Part, setting: Setting, limits: Limits | None, seconds: float, sender: Connection) -> None:
    """What a section's process does. What it lacks is "not run"; anything else that is raised has failed."""
    sender.send(("begun", ""))
    budget = Budget(time.monotonic() + seconds)
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
