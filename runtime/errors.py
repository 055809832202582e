"""The ground of every error that the house raises on purpose, and the errors of the serving side.

    TriremeError              base: carries the message and the exit code
     |-- InputError           the user's input is wrong: what, got, expected, fix; exit 2
     |    `-- MachineError    a package, tool, port or disk that this machine lacks
     `-- ServingError
          |-- BadRequest      the caller's input is wrong: INVALID_ARGUMENT, HTTP 400
          |-- BadEnvironment  this machine or its packages cannot serve: exit 2
          |-- Unavailable     cannot answer now, though the request is sound: UNAVAILABLE, HTTP 503
          |-- TooLate         the request's own time ran out: DEADLINE_EXCEEDED
          `-- ServerFault     a server did not start, answer or stop as promised: exit 1
               |-- NotProven     a version gives other outputs than the reference
               `-- ProofOverdue  the proof did not end in time

`builders.errors`, `loadtest.errors` and `cluster.errors` grow from the same ground.
"""

from __future__ import annotations

UNPROVEN = "is not proven on this machine"  # in the message; who reads a pod's last words knows it by this


class TriremeError(Exception):
    """Base of the tree. `exit_code` is what a command returns."""

    exit_code = 1


class InputError(TriremeError):
    """The input is wrong, and the user can mend it.

    The four parts are kept apart so that tests and programs can read them.
    """

    exit_code = 2

    def __init__(self, what: str, *, got: object, expected: str, fix: str) -> None:
        self.what, self.got, self.expected, self.fix = what, got, expected, fix
        super().__init__(f"{what}: got {got}; expected {expected}. Fix: {fix}")


class MachineError(InputError):
    """Something this machine lacks: a package, a tool, a free port, disk space."""


class ServingError(TriremeError):
    """Base of what the serving side raises."""


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
