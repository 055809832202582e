"""Sections run one after the other, each in a process of its own with a time limit.

A section that raises, hangs or takes its process down is written down with its reason, and the next one begins: a CUDA
fault spoils a whole process, and two flavours of TensorRT do not fit into one. Rows cross a pipe as they are measured,
so that what was measured before a fault is kept.

Sections are forked from a server that imports torch once: minutes from a cold disk, before the budget begins.
"""

from __future__ import annotations

import multiprocessing
import pkgutil
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

from builders.errors import MachineError
from measure.gpu_proof.record import Measured, Section
from measure.gpu_proof.roofline import DeviceLimits
from measure.gpu_proof.setting import Setting
from measure.gpu_proof.timing import lacking
from runtime.heard import hear_signals

BEGIN_S = 120.0  # of the server, until its first process has ended
GRACE_S = 10.0  # for the case under way when a section's time is over
_END_S = 5.0  # from the end of a process's pipe to its own
# Imported once by the server that sections are forked from: none of them wakes CUDA by being imported.
_PRELOADED = ["torch", "transformers.models.bert.modeling_bert", "transformers.models.llama.modeling_llama", "onnx"]
ENDED = "the proof was ended before it was done"


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


def run_parts(parts: Sequence[Part], setting: Setting, seconds: float) -> Iterator[Section]:
    """One section a part, in order, all within `seconds`. Never raises for what happens inside one.

    A signal that ends the whole is raised after the section under way, with the rows that it has until then.
    """
    context = _fork_server()
    end = time.monotonic() + seconds
    for part in parts:
        left = end - time.monotonic()
        if left < part.least_s:
            yield Section(part.name, "not run", f"time: {max(left, 0):.0f} s of the budget were left")
            continue
        rows: list[Measured] = []
        try:
            section = _run(context, part, setting, min(left, part.most_s), rows)
        except (KeyboardInterrupt, SystemExit):
            yield Section(part.name, "not run", ENDED, rows=tuple(rows))
            raise
        yield section
        setting = replace(setting, limits=setting.limits or _limits(section))


def _fork_server() -> Any:
    """Returns when it has imported all. Raises MachineError where it brings forth no process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    first = context.Process(target=int)
    hear_signals()  # it learns by one that a section has ended
    first.start()
    first.join(BEGIN_S)
    if first.exitcode is None:
        raise MachineError(
            "the server that sections are forked from", got=f"no end of its first process within {BEGIN_S:.0f} s",
            expected="one within moments", fix="run on a machine that lets processes fork",
        )  # fmt: skip
    return context


def _limits(section: Section) -> DeviceLimits | None:
    """From the section that measured them."""
    figures = {name: value for row in section.rows for name, value in row.figures.items()}
    if section.name != "limits" or not {"copy_gb_per_s", "product_tflop_per_s"} <= set(figures):
        return None
    return DeviceLimits(figures["copy_gb_per_s"] * 1e9, figures["product_tflop_per_s"] * 1e12)


def _run(context: Any, part: Part, setting: Setting, seconds: float, rows: list[Measured]) -> Section:
    """Appends to `rows` as they come."""
    began = time.monotonic()
    end = Section(part.name, "failed", "it did not end in its time, and was ended")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(part, replace(setting, deadline=began + seconds), sender))
    try:
        process.start()
        sender.close()  # this end; the process holds the other, and its death is the end of the pipe
        while receiver.poll(max(0.0, began + seconds + GRACE_S - time.monotonic())):
            if isinstance(word := receiver.recv(), Section):
                end = word
                break
            rows.append(word)
    except (EOFError, OSError):  # OSError: in the middle of a row
        process.join(_END_S)  # to its exit code
        end = replace(end, reason=f"its process ended with exit code {process.exitcode}")
    finally:
        if process.pid is not None:
            process.kill()
            process.join(_END_S)
        receiver.close()
    return replace(end, seconds=time.monotonic() - began, rows=tuple(rows))


def _measure(part: Part, setting: Setting, sender: Connection) -> None:
    """What a section's process does. What it lacks is "not run"; anything else that is raised has failed."""
    end = Section(part.name, "ran")
    try:
        for row in pkgutil.resolve_name(part.function)(setting, *part.arguments):
            sender.send(row)
    except Exception as error:  # noqa: BLE001 - the other sections go on, and the result shows this one
        if reason := lacking(error):
            end = Section(part.name, "not run", reason)
        else:
            traceback.print_exc()
            end = Section(part.name, "failed", f"{type(error).__name__}: {error}")
    sender.send(end)
    sender.close()
