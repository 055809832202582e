"""Errors of working with a cluster, on the ground of `runtime.errors`.

TriremeError
 |-- InputError
 |    `-- ClusterError   a cluster that cannot be reached, or refuses what was asked               exit 2
 `-- RolloutError        what was deployed did not become ready; the pods' own reasons             exit 1
"""

from __future__ import annotations

from runtime.errors import InputError, TriremeError


class ClusterError(InputError):
    """A cluster that cannot be reached, or refuses what was asked: rights, quota, conflicts, invalid objects.

    `code` is the HTTP status of the API server's answer, 0 when there was none.
    """

    def __init__(self, what: str, *, got: object, expected: str, fix: str, code: int = 0) -> None:
        self.code = code
        super().__init__(what, got=got, expected=expected, fix=fix)


class RolloutError(TriremeError):
    """What was deployed did not become ready. The message holds the pods' own reasons and the next step."""
