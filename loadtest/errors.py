"""Errors of the load test, on the ground of `runtime.errors`.

TriremeError
 |-- InputError
 |    `-- LoadInputError   a file, an address, a model or a plan that no load test can work with   exit 2
 `-- LoadRunError          the run ended without figures that can be trusted                       exit 1
"""

from __future__ import annotations

from runtime.errors import InputError, TriremeError


class LoadInputError(InputError):
    """A file, an address, a model or a plan that no load test can work with."""


class LoadRunError(TriremeError):
    """The load generator died, hung or measured nothing."""
