"""Whether this gateway should be sent requests: what its supervisor says, and whether it is leaving."""

from __future__ import annotations

import asyncio

from runtime.told import CLOSED, READY

_WORD_S = 1.0


class Readiness:
    """`told` by the supervisor, line by line. Without one, Triton is asked instead.

    `closed`: the server answers, perhaps, but is not proven yet, or was found wrong: no answer of it may be used.
    """

    def __init__(self, supervised: bool) -> None:
        self.supervised = supervised
        self.draining = False
        self.closed = supervised
        self._reason: str | None = "starting" if supervised else None
        self._waiting: list[asyncio.Future[None]] = []

    async def opens(self) -> bool:
        """Whether answers may be used. A supervisor tells the world that it serves, and us, at about the same time: so
        who comes first waits a moment for the word."""
        if self.closed:
            one = asyncio.get_running_loop().create_future()
            self._waiting.append(one)
            await asyncio.wait([one], timeout=_WORD_S)
            if one in self._waiting:
                self._waiting.remove(one)
        return not self.closed

    def told(self, line: str) -> None:
        self.closed = line.startswith(CLOSED)
        if not self.closed:
            for one in self._waiting:
                if not one.done():
                    one.set_result(None)
            self._waiting.clear()
        self._reason = None if line == READY else line.removeprefix(CLOSED)[:200] or "not ready"

    @property
    def reason(self) -> str | None:
        """None when ready."""
        return "draining" if self.draining else self._reason
