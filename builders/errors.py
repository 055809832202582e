"""Every error that Trireme raises on purpose.

    TriremeError                 base: carries the message and the exit code
     |-- InputError              the user's input is wrong                       exit 2
     |    |-- SpecError          a key, type or combination in the spec file
     |    |-- CheckpointError    weights that are missing, truncated or unknown
     |    |-- MachineError       a package, tool, port or disk this machine lacks
     |    |-- ClusterError       a cluster that cannot be reached, or refuses what was asked
     |    `-- UnsupportedError   valid input for a stage that does not exist yet
     `-- CheckError              an artifact failed a check; figures are printed exit 1
          |-- ParityError        two executions of the same model disagree
          |-- QualityError       a compressed model misses its quality budget
          |-- EngineError        TensorRT refused the network or dropped an input
          |-- ServiceError       a server did not start, answer or stop as promised
          `-- RolloutError       what was deployed did not become ready; the pods' own reasons

An `InputError` always says four things: what was read, what was got, what was expected, how to fix it.
"""

from __future__ import annotations


class TriremeError(Exception):
    """Base of the tree. `exit_code` is what the CLI returns."""

    exit_code = 1


class InputError(TriremeError):
    """The input is wrong, and the user can mend it.

    The four parts are kept apart so that tests and programs can read them.
    """

    exit_code = 2

    def __init__(self, what: str, *, got: object, expected: str, fix: str) -> None:
        self.what, self.got, self.expected, self.fix = what, got, expected, fix
        super().__init__(f"{what}: got {got}; expected {expected}. Fix: {fix}")


class SpecError(InputError):
    """A key, a type or a combination of values in the spec file."""


class CheckpointError(InputError):
    """Weights or configuration that are missing, truncated, unsafe or of an unknown architecture."""


class MachineError(InputError):
    """Something this machine lacks: a package, a tool, a free port, disk space."""


class ClusterError(InputError):
    """A cluster that cannot be reached, or refuses what was asked: rights, quota, conflicts, invalid objects.

    `code` is the HTTP status of the API server's answer, 0 when there was none.
    """

    def __init__(self, what: str, *, got: object, expected: str, fix: str, code: int = 0) -> None:
        self.code = code
        super().__init__(what, got=got, expected=expected, fix=fix)


class UnsupportedError(InputError):
    """Sound input for a stage that does not exist yet."""


class CheckError(TriremeError):
    """An artifact failed a check. The message carries the figures."""


class ParityError(CheckError):
    """Two executions of the same model disagree."""


class QualityError(CheckError):
    """A compressed model misses the spec's quality budget."""


class EngineError(CheckError):
    """TensorRT refused the network, or would have built something else than was asked for."""


class ServiceError(CheckError):
    """A server did not start, answer or stop as promised."""


class RolloutError(CheckError):
    """What was deployed did not become ready. The message holds the pods' own reasons and the next step."""
