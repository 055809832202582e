"""Errors of the serving side.

    ServingError
     |-- BadRequest      the caller's input is wrong: INVALID_ARGUMENT, HTTP 400
     |-- BadEnvironment  this machine or its packages cannot serve: exit 2
     |-- Unavailable     cannot answer now, though the request is sound: UNAVAILABLE, HTTP 503
     |-- TooLate         the request's own time ran out: DEADLINE_EXCEEDED
     `-- ServerFault     a server did not start, answer or stop as promised: exit 1
          |-- NotProven     a version gives other outputs than the reference
          `-- ProofOverdue  the proof did not end in time

The tree is apart from `builders.errors` because the serving image holds no `builders`.
"""

from __future__ import annotations

UNPROVEN = "is not proven on this machine"  # in the message; who reads a pod's last words knows it by this


class ServingError(Exception):
    """Base of the tree. `exit_code` is what a command returns."""

    exit_code = 1


class BadRequest(ServingError):
    """The caller's input is wrong. The message may be shown to the caller: it holds no path and no stack."""

    exit_code = 2


class BadEnvironment(ServingError):
    """A package, port or setting that serving cannot work with. The message says what to do."""

    exit_code = 2


class Unavailable(ServingError):
    """The service cannot answer now; the same request may succeed later. The message may be shown to the caller."""


class TooLate(ServingError):
    """The time that the request was given ran out before its answer was complete. The message may be shown."""


class ServerFault(ServingError):
    """A server did not start, answer or stop as promised."""


class NotProven(ServerFault):
    """A version gave other outputs than the reference, or has no proof to compare with: it must not serve."""


class ProofOverdue(ServerFault):
    """The proof did not end in time: the server is busy, or far too slow. Says nothing of its outputs."""
