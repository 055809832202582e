"""Being asked to stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGINT set, in place of what they did before. Main thread only.

    Named explicitly, because a process that a script starts in the background inherits an ignored SIGINT, and Python
    then raises no KeyboardInterrupt.
    """
    asked_to_stop = threading.Event()
    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in previous:
        signal.signal(number, lambda *_: asked_to_stop.set())
    try:
        yield asked_to_stop
    finally:
        for number, handler in previous.items():
            # None: it was set from C, and cannot be put back from here.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
