"""Whether this gateway should be sent requests: what its supervisor says, and whether it is leaving."""

from __future__ import annotations

from runtime.told import CLOSED, READY


class Readiness:
    """`told` by the supervisor, line by line. Without one, Triton is asked instead.

    `closed`: the server answers, perhaps, but is not proven yet, or was found wrong: no answer of it may be used.
    """

    def __init__(self, supervised: bool) -> None:
        self.supervised = supervised
        self.draining = False
        self.closed = supervised
        self._reason: str | None = "starting" if supervised else None

    def told(self, line: str) -> None:
        self.closed = line.startswith(CLOSED)
        self._reason = None if line == READY else line.removeprefix(CLOSED)[:200] or "not ready"

    @property
    def reason(self) -> str | None:
        """None when ready."""
        return "draining" if self.draining else self._reason
