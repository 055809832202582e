"""Whether this gateway should be sent requests: what its supervisor says, and whether it is leaving."""

from __future__ import annotations


class Readiness:
    """`told` by the supervisor, line by line: `ready`, or the reason why not. Without one, Triton is asked instead."""

    def __init__(self, supervised: bool) -> None:
        self.supervised = supervised
        self.draining = False
        self._reason: str | None = "starting" if supervised else None

    def told(self, line: str) -> None:
        self._reason = None if line == "ready" else line[:200] or "not ready"

    @property
    def reason(self) -> str | None:
        """None when ready."""
        return "draining" if self.draining else self._reason
