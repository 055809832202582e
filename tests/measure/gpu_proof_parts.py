"""Sections that end in every way a section can, for the tests of how they are run."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

from measure.gpu_proof.record import Measured
from measure.gpu_proof.setting import Setting
from measure.gpu_proof.timing import NotRun

ROW = Measured("case", "way", figures={"copy_gb_per_s": 100.0, "product_tflop_per_s": 10.0})


def sound(setting: Setting) -> Iterator[Measured]:
    assert setting.left_s > 0
    yield ROW
    yield Measured(
        "limits", "handed on", figures={} if setting.limits is None else {"bytes_per_s": setting.limits.bytes_per_s}
    )


def raising(setting: Setting) -> Iterator[Measured]:
    yield ROW
    raise RuntimeError("the third kernel is broken")


def lacking(setting: Setting) -> Iterator[Measured]:
    if setting.left_s > 0:
        raise NotRun("no such GPU")
    yield ROW


def without_package(setting: Setting) -> Iterator[Measured]:
    import a_package_that_nobody_has  # type: ignore[import-not-found]  # noqa: F401

    yield ROW


def dying(setting: Setting) -> Iterator[Measured]:
    yield ROW
    os.kill(os.getpid(), signal.SIGSEGV)


def hanging(setting: Setting) -> Iterator[Measured]:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    yield Measured("process", "hanging", figures={"pid": float(os.getpid())})
    threading.Event().wait()


def interrupting(setting: Setting, pid: str) -> Iterator[Measured]:
    """Interrupts the process `pid`, which has the first row by then: the second is more than a pipe holds."""
    yield ROW
    yield Measured("case", "way", note="x" * (1 << 20))
    os.kill(int(pid), signal.SIGINT)
    threading.Event().wait()
