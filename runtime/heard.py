"""Signals that a program lives by."""

from __future__ import annotations

import signal


def hear_signals() -> None:
    """Whoever started us may have blocked signals, which is inherited from program to program: then SIGTERM ends
    nothing, and nobody learns by SIGCHLD that a child has ended."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGCHLD})
