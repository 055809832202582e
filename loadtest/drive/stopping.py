"""Ctrl-C and SIGTERM of a load test: what was measured until then is worth a report."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any


class Stop:
    """While entered, both signals ask a load that runs (`armed`) to end early; before it runs they end the process.

    A second signal changes nothing: what is left to do is bounded, and writes the report. Main thread only.
    """

    def __init__(self) -> None:
        self.armed = False
        self.asked = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Stop:
        # By name, because a process that a script starts in the background inherits an ignored SIGINT.
        self._previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in self._previous:
            signal.signal(number, self._heed)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            # None: it was set from C, and cannot be put back from here
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _heed(self, number: int, _: FrameType | None) -> None:
        if self.armed:
            self.asked = True
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            raise SystemExit(128 + number)
