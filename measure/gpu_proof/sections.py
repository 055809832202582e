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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

from builders.errors import MachineError, UnsupportedError
from measure.gpu_proof.record import Measured, Section, Status
from measure.gpu_proof.roofline import DeviceLimits
from measure.gpu_proof.setting import NotRun, Setting

START_S = 180.0  # of the server: it imports from a disk that may be cold
BEGIN_S = 60.0  # of a section's process, until its first word
GRACE_S = 10.0  # for the case under way when a section's time is over
_END_S = 5.0  # from asking a process to end to ending it
# Imported once by the server that sections are forked from: none of them wakes CUDA by being imported.
_PRELOADED = ["torch", "transformers.models.bert.modeling_bert", "transformers.models.llama.modeling_llama", "onnx"]
_OURS = ("builders", "measure", "runtime")
_ENDED = "the proof was ended before it was done"


@dataclass(frozen=True)
class Part:
    """A section to run. It gets at most `most_s`, and is not begun with less than `least_s` left of the budget.

    `function` names what yields its rows, given the setting and `arguments`. It is imported in the section's process:
    a package which a machine lacks costs the sections that need it, and no other.
    """

    name: str
    function: str
    most_s: float
    least_s: float = 5.0
    arguments: tuple[str, ...] = ()

    def resolve(self) -> Callable[..., Any]:
        module, _, name = self.function.rpartition(".")
        function: Callable[..., Any] = getattr(importlib.import_module(module), name)
        return function


def run_parts(
    parts: Sequence[Part], setting: Setting, seconds: float, report: Callable[[Section], None] = lambda section: None
) -> list[Section]:
    """One section a part, in order, all within `seconds`. Never raises for what happens inside one.

    What ends the whole (a signal) is raised once every part has been reported, with the rows that it has until then.
    Raises MachineError where the server that sections are forked from does not start.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    _start_server(context)
    deadline = time.monotonic() + seconds
    done: list[Section] = []
    for number, part in enumerate(parts):
        rows: list[Measured] = []
        try:
            left = deadline - time.monotonic()
            if left < part.least_s:
                section = Section(part.name, "not run", f"time: {max(left, 0):.0f} s of the budget were left", 0.0)
            else:
                section = _run(context, part, replace(setting, limits=_limits(done)), min(left, part.most_s), rows)
            done.append(section)
            report(section)
        except (KeyboardInterrupt, SystemExit):  # also one that comes while a section is reported
            if len(done) == number:
                report(Section(part.name, "not run", _ENDED, 0.0, tuple(rows)))
            for other in parts[number + 1 :]:
                report(Section(other.name, "not run", _ENDED, 0.0))
            raise
    return done


def _limits(done: Sequence[Section]) -> DeviceLimits | None:
    """From the section that measured them; None where it did not."""
    rows = (row for section in done if section.name == "limits" for row in section.rows)
    figures = {name: value for row in rows for name, value in row.figures.items()}
    if not {"copy_gb_per_s", "product_tflop_per_s"} <= set(figures):
        return None
    return DeviceLimits(figures["copy_gb_per_s"] * 1e9, figures["product_tflop_per_s"] * 1e12)


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


def _run(context: Any, part: Part, setting: Setting, seconds: float, rows: list[Measured]) -> Section:
    """Appends to `rows` as they come."""
    began = time.monotonic()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=measure_here, args=(part, setting, seconds, sender))
    patience = 0.0  # none where this is ended from outside
    try:
        process.start()
        sender.close()  # this end; the process holds the other, and its death is the end of the pipe
        end = _collect(receiver, rows, seconds)
        patience = _END_S
    finally:
        _end(process, patience)
        receiver.close()
    status, reason = end or ("failed", f"its process ended with exit code {process.exitcode}")
    return Section(part.name, status, reason, time.monotonic() - began, tuple(rows))


def _collect(receiver: Connection, rows: list[Measured], seconds: float) -> tuple[Status, str] | None:
    """Rows until the section says how it ended; None where it died. `seconds` count from its first word."""
    deadline, late = time.monotonic() + BEGIN_S, f"its process did not begin within {BEGIN_S:.0f} s, and was ended"
    while receiver.poll(max(0.0, deadline - time.monotonic())):
        try:
            word = receiver.recv()
        except (EOFError, OSError):  # OSError: in the middle of a row
            return None
        if word == "begun":
            deadline, late = time.monotonic() + seconds + GRACE_S, "it did not end in its time, and was ended"
        elif isinstance(word, Measured):
            rows.append(word)
        else:
            status, reason = word
            return status, reason
    return "failed", late


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


def measure_here(part: Part, setting: Setting, seconds: float, sender: Connection) -> None:
    """What a section's process does. What it lacks is "not run"; anything else that is raised has failed."""
    sender.send("begun")
    end: tuple[Status, str] = ("ran", "")
    try:
        for row in part.resolve()(replace(setting, deadline=time.monotonic() + seconds), *part.arguments):
            sender.send(row)
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
