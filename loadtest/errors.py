"""Errors of the load test.

LoadTestError            base; `exit_code` is what the CLI returns
 |-- LoadInputError      the user's input is wrong: what, got, expected, fix      exit 2
 `-- LoadRunError        the run ended without figures that can be trusted        exit 1
"""

from __future__ import annotations


class LoadTestError(Exception):
    """Base of the tree."""

    exit_code = 1


class LoadInputError(LoadTestError):
    """A file, an address, a model or a plan that no load test can work with.

    The four parts are kept apart so that tests and programs can read them.
    """

    exit_code = 2

    def __init__(self, what: str, *, got: object, expected: str, fix: str) -> None:
        self.what, self.got, self.expected, self.fix = what, got, expected, fix
        super().__init__(f"{what}: got {got}; expected {expected}. Fix: {fix}")


class LoadRunError(LoadTestError):
    """The load generator died, hung or measured nothing."""
