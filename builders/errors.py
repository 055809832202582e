"""Every error that building raises on purpose. The first three stand in `runtime.errors`.

    TriremeError                 base: carries the message and the exit code
     |-- InputError              the user's input is wrong                       exit 2
     |    |-- SpecError          a key, type or combination in the spec file
     |    |-- CheckpointError    weights that are missing, truncated or unknown
     |    |-- MachineError       a package, tool, port or disk this machine lacks
     |    `-- UnsupportedError   valid input for a stage that does not exist yet
     `-- CheckError              an artifact failed a check; figures are printed exit 1
          |-- ParityError        two executions of the same model disagree
          |-- QualityError       a compressed model misses its quality budget
          |-- DivergedError      a training came to numbers that are none
          `-- EngineError        TensorRT refused the network or dropped an input

An `InputError` always says four things: what was read, what was got, what was expected, how to fix it.
"""

from __future__ import annotations

from runtime.errors import InputError as InputError
from runtime.errors import MachineError as MachineError
from runtime.errors import TriremeError as TriremeError


class SpecError(InputError):
    """A key, a type or a combination of values in the spec file."""


class CheckpointError(InputError):
    """Weights or configuration that are missing, truncated, unsafe or of an unknown architecture."""


class UnsupportedError(InputError):
    """Sound input for a stage that does not exist yet."""


class CheckError(TriremeError):
    """An artifact failed a check. The message carries the figures."""


class ParityError(CheckError):
    """Two executions of the same model disagree."""


class QualityError(CheckError):
    """A compressed model misses the spec's quality budget."""


class DivergedError(CheckError):
    """A training's loss, gradient or weights are no numbers any more, or far too large. Nothing of it is kept."""


class EngineError(CheckError):
    """TensorRT refused the network, or would have built something else than was asked for."""
