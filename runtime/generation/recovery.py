"""A fresh executor after a fault: at once, then after growing pauses, and not for ever."""

from __future__ import annotations

import traceback
from collections.abc import Callable

from runtime.backoff import pause_s
from runtime.errors import ServerFault
from runtime.step import StepExecutor
from runtime.tensorrt.cuda import DeviceLost

MOST_FAULTS = 5  # in a row, with no step between that worked; then a new process is the better repair
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 8.0


class Recovery:
    """Counts the faults of an executor, and resets it. For the thread that runs it."""

    def __init__(self, executor: StepExecutor, clock: Callable[[], float]) -> None:
        self._executor, self._clock = executor, clock
        self._faults = 0
        self._again_at: float | None = None
        self._resetting = False

    @property
    def under_way(self) -> bool:
        """Whether there is no executor yet, and somebody sees to it. Any thread may ask."""
        return self._resetting or self.pending

    @property
    def pending(self) -> bool:
        """Whether the last reset failed: nothing can run."""
        return self._again_at is not None

    def due(self) -> bool:
        """Whether the pause before the next reset is over."""
        return self._again_at is not None and self._clock() >= self._again_at

    def worked(self) -> None:
        """A step did."""
        self._faults = 0

    def lost(self) -> bool:
        """Whether the executor can only be reset; also where it cannot even say so."""
        if self.pending:
            return False  # that is known
        try:
            return self._executor.lost()
        except Exception as error:  # noqa: BLE001 - no descriptors, say; what cannot be asked cannot be trusted
            traceback.print_exception(error)
            return True

    def reset(self) -> str | None:
        """None when the executor is ready again, else what to tell requests until the next try.

        Raises DeviceLost, and ServerFault after too many faults in a row: only a new process helps.
        """
        self._faults += 1
        if self._faults > MOST_FAULTS:
            raise ServerFault(f"the executor failed {self._faults} times, and no step between them worked")
        self._resetting, self._again_at = True, None
        try:
            self._executor.reset()
        except DeviceLost:
            raise
        except Exception as error:  # noqa: BLE001 - no memory, no processes, no files: there may be some later
            traceback.print_exception(error)
            pause = pause_s(self._faults, _FIRST_PAUSE_S, _LONGEST_PAUSE_S)
            self._again_at = self._clock() + pause
            return f"the executor has failed and is not ready again; send the request again in {pause:.1f} s"
        finally:
            self._resetting = False
        return None
