"""What is to be done about what happens to a server. Pure: events with their time go in, actions come out.

serving ──died, wrong, failing or standing still──▶ repairing ──repaired──▶ serving
   │                                          │   ▲└──not repaired──┐
   │                                          │   └─────────────────┘  with a growing pause
   └──asked to stop──▶ ended ◀──asked to stop, or too many repairs──┘
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NamedTuple

from runtime.backoff import pause_s

FAILURES_BEFORE_REPAIR = 2  # one wrong answer may pass
# With work waiting and nothing done. Longer than any step or batch should take: a step reads at most `chunk_tokens`.
STANDSTILL_S = 30.0
# With its executor lost and another one starting. Executors have limits of their own, which are shorter: three times
# 600 s for ranks whose engines have many gigabytes.
RECOVERING_S = 2000.0
MOST_REPAIRS = 20  # within the window: a server that needs more is not repaired by them
WINDOW_S = 600.0
MOST_FAILED_REPAIRS = 5  # one after another


class Event(Enum):
    ANSWERED = auto()  # the probe's inference succeeded
    MOVING = auto()  # the probe was refused or not answered in time, and others' work was done meanwhile
    BUSY = auto()  # the same, and nothing was seen to be done
    RECOVERING = auto()  # the same, and the model says that it gets a new executor
    FAILED = auto()  # the probe got no sound answer
    WRONG = auto()  # the version that answers is not proven on this machine
    DIED = auto()  # the server's process has gone, or one of its stubs
    REPAIRED = auto()
    NOT_REPAIRED = auto()
    ASKED_TO_STOP = auto()


class Act(Enum):
    NOTHING = auto()
    REPAIR = auto()
    GIVE_UP = auto()
    STOP = auto()


class Action(NamedTuple):
    act: Act
    reason: str = ""
    pause_s: float = 0.0  # before a repair


NOTHING = Action(Act.NOTHING)


@dataclass
class Supervision:
    """Begins at the moment in which a server has become ready."""

    began: float
    standstill_s: float = STANDSTILL_S
    repairs: int = 0  # since the start
    _repairing: bool = False
    _end: Action | None = None
    _failures: int = 0
    _failed_repairs: int = 0
    _recent: list[float] = field(default_factory=list)
    _moved: float = 0.0
    _recovering: float | None = None  # since

    def __post_init__(self) -> None:
        self._moved = self.began

    def hear(self, event: Event, now: float, reason: str = "") -> Action:
        """What the event calls for. Once it is over, the same for whatever comes."""
        if self._end is not None:
            return self._end
        if event is Event.ASKED_TO_STOP:
            return self._over(Action(Act.STOP))
        if self._repairing:
            return self._hear_repairing(event, now, reason)
        return self._hear_serving(event, now, reason)

    def _hear_serving(self, event: Event, now: float, reason: str) -> Action:
        if event in (Event.ANSWERED, Event.MOVING):
            self._moved, self._recovering = now, None
        elif event is Event.RECOVERING:
            self._recovering = now if self._recovering is None else self._recovering
            if now - self._recovering < RECOVERING_S:
                self._moved = now
        if event is Event.ANSWERED:
            self._failures = 0
        elif event is Event.FAILED:
            self._failures += 1
        still_s = now - self._moved
        if event in (Event.DIED, Event.WRONG) or self._failures >= FAILURES_BEFORE_REPAIR:
            return self._repair(now, reason)
        if event in (Event.BUSY, Event.RECOVERING) and still_s >= self.standstill_s:
            return self._repair(now, f"nothing was done for {still_s:.0f} s with work waiting ({reason})")
        return NOTHING

    def _hear_repairing(self, event: Event, now: float, reason: str) -> Action:
        """Whatever is still heard of the server of before is out of date."""
        if event is Event.REPAIRED:
            self._repairing, self._failures, self._failed_repairs, self._moved = False, 0, 0, now
            self._recovering = None
        elif event is Event.NOT_REPAIRED:
            self._failed_repairs += 1
            return self._repair(now, reason)
        return NOTHING

    def _repair(self, now: float, reason: str) -> Action:
        self._recent = [when for when in self._recent if now - when < WINDOW_S]
        if self._failed_repairs >= MOST_FAILED_REPAIRS:
            return self._over(Action(Act.GIVE_UP, f"{self._failed_repairs} repairs in a row did not help: {reason}"))
        if len(self._recent) >= MOST_REPAIRS:
            often = f"{MOST_REPAIRS} repairs within {WINDOW_S / 60:.0f} minutes were not enough: {reason}"
            return self._over(Action(Act.GIVE_UP, often))
        self._recent.append(now)
        self.repairs += 1
        self._repairing = True
        # The first is made at once; after one that failed, 1 s, 2 s, 4 s, 8 s.
        return Action(Act.REPAIR, reason, pause_s(self._failed_repairs, 1.0))

    def _over(self, action: Action) -> Action:
        self._end = action
        return action
