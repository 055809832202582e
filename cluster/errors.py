"""Errors of working with a cluster, on the ground of `runtime.errors`.

TriremeError
 |-- InputError
 |    `-- ClusterError   a cluster that cannot be reached, or refuses what was asked               exit 2
 `-- RolloutError        what was deployed did not become ready; the pods' own reasons             exit 1
"""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType

from runtime.errors import InputError, TriremeError


class ClusterError(InputError):
    """A cluster that cannot be reached, or refuses what was asked: rights, quota, conflicts, invalid objects.

    `code` is the HTTP status of the API server's answer, 0 when there was none.
    """

    def __init__(self, what: str, *, got: object, expected: str, fix: str, code: int = 0) -> None:
        self.code = code
        super().__init__(what, got=got, expected=expected, fix=fix)


@dataclass(frozen=True)
class Tolerated:
    """A block that ends early, without an error, where the API server answers with this status."""

    code: int

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        return isinstance(error, ClusterError) and error.code == self.code


class RolloutError(TriremeError):
    """What was deployed did not become ready. The message holds the pods' own reasons and the next step."""
