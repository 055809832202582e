"""Sections that end in every way a section can, for the tests of how they are run."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

from measure.gpu_proof.record import Row
from measure.gpu_proof.roofline import Limits
from measure.gpu_proof.setting import Budget, NotRun, Setting

ROW = Row("case", "way", figures={"copy_gb_per_s": 100.0, "product_tflop_per_s": 10.0})


def sound(setting: Setting, limits: Limits | None, budget: Budget) -> Iterator[Row]:
    assert budget.left_s > 0
    yield ROW
    yield Row("limits", "handed on", figures={} if limits is None else {"bytes_per_s": limits.bytes_per_s})


def raising(setting: Setting, limits: Limits | None, budget: Budget) -> Iterator[Row]:
    yield ROW
    raise RuntimeError("the third kernel is broken")


def lacking(setting: Setting, limits: Limits | None, budget: Budget) -> Iterator[Row]:
    if budget.left_s > 0:
        raise NotRun("no such GPU")
    yield ROW


def without_package(setting: Setting, limits: Limits | None, budget: Budget) -> Iterator[Row]:
    import a_package_that_nobody_has  # type: ignore[import-not-found]  # noqa: F401

    yield ROW


def dying(setting: Setting, limits: Limits | None, budget: Budget) -> Iterator[Row]:
    yield ROW
    os.kill(os.getpid(), signal.SIGSEGV)


def hanging(setting: Setting, limits: Limits | None, budget: Budget) -> Iterator[Row]:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    yield Row("process", "hanging", figures={"pid": float(os.getpid())})
    wait_for_ever()


def wait_for_ever() -> None:
    threading.Event().wait()
