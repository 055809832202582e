"""The deaths of a server's Python stubs, seen in /proc.

Triton 2.51 notices a dead stub when the next request fails, starts no other, and never ends the streams that it held.
A stub that Triton itself unloads is waited for by Triton at once; one that died stays a zombie. That tells them apart:
exit codes do not, for a stub may crash on its regular way out.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

SETTLED_S = 0.3  # Triton waits for a stub that it ends within some milliseconds
LOADING_SETTLED_S = 3.0  # while it loads or unloads models, and no core may be free for the thread that waits


class Stubs:
    """Of one server process. `learn` while all is well; `dead` often: each look reads a line for each stub. Those of
    models in the folder `beside` are not looked at."""

    def __init__(
        self,
        server: int,
        proc: Path = Path("/proc"),
        clock: Callable[[], float] = time.monotonic,
        beside: Path | None = None,
    ) -> None:
        self._server, self._proc, self._clock, self._beside = server, proc, clock, beside
        self._known: set[int] = set()
        self._zombie_since: dict[int, float] = {}

    def learn(self) -> None:
        """Takes the server's children of now. A kernel that does not tell them leaves deaths to the probe."""
        known: set[int] = set()
        for path in self._proc.glob(f"{self._server}/task/*/children"):
            try:
                known |= {int(number) for number in path.read_text().split()}
            except OSError:
                continue  # a thread that has ended meanwhile
        self._known = {stub for stub in known if not self._is_beside(stub)}

    def _is_beside(self, stub: int) -> bool:
        """Triton names the model's file to its stub."""
        if self._beside is None:
            return False
        try:
            return f"{self._beside}/".encode() in (self._proc / str(stub) / "cmdline").read_bytes()
        except OSError:
            return False  # it has ended meanwhile

    def dead(self, settled_s: float = SETTLED_S) -> int | None:
        """The process id of a stub that died, and has been nobody's concern for `settled_s`."""
        for stub in tuple(self._known):
            state = self._state(stub)
            if state is None:
                self._known.discard(stub)  # unloaded
                self._zombie_since.pop(stub, None)
            elif state == "Z" and self._clock() - self._zombie_since.setdefault(stub, self._clock()) >= settled_s:
                return stub
        return None

    def _state(self, process: int) -> str | None:
        """None for a process that is gone, or whose number is somebody else's by now."""
        try:
            fields = (self._proc / str(process) / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return fields[0] if int(fields[1]) == self._server else None
