"""Whether an update begins now, why, and with which rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from builders.spec import OnlineSlice, WhenSlice
from online.learner.memory import Memory, load_memory
from online.loop import drift
from online.loop.gathered import Gathered, gather, lacking, split_rows, unread_text
from online.loop.records import LoopState
from online.tasks.task import LearningTask, Rows
from runtime.errors import InputError


class Samples(Protocol):
    """The store, as far as the loop reads it."""

    def read(self, after: int = 0) -> Iterator[tuple[int, dict[str, Any]]]: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Due:
    """`rows`, to learn from and held out, with the `trigger`; None where it waits, and `waits` says for what."""

    gathered: Gathered
    state: LoopState  # with what drift has seen
    waits: str = ""
    trigger: str = ""
    rows: tuple[Rows, Rows] | None = None


@dataclass
class Clock:
    """The wall clock may jump: backwards, and no time has passed since; how long this process has run counts anyway."""

    wall: Callable[[], float] = time.time
    monotonic: Callable[[], float] = time.monotonic
    _started: float = field(init=False)

    def __post_init__(self) -> None:
        self._started = self.monotonic()

    def since(self, then: float) -> float:
        """Seconds since a moment of the wall clock, as far as anybody can know."""
        return max(self.wall() - then, 0.0)

    def running(self) -> float:
        return self.monotonic() - self._started

    def reset(self) -> None:
        self._started = self.monotonic()


@dataclass(frozen=True)
class LearningFrom:
    """The champion's task and folder, and what a person calls a row of it."""

    task: LearningTask
    champion: Path
    noun: str


def look(state: LoopState, online: OnlineSlice, store: Samples, known: LearningFrom, clock: Clock) -> Due:
    """Reads what has come since the last update. Raises FeedbackUnavailable; InputError for a memory that does not go
    with the spec."""
    learner, memory = online.learner, load_memory(known.champion)
    require_window(memory, known.task, learner.window)
    gathered = gather(store.read(state.fed_to), state.fed_to, learner.min_rating, known.task)
    if not gathered.documents:
        more = f" (but {unread_text(gathered.unread)})" if gathered.unread else ""
        return Due(gathered, state, waits=f"no new feedback to learn from{more}")
    if online.when.drift:
        state = _scored(state, gathered, known, memory)
    trigger = _trigger(state, online.when, len(gathered.documents), clock)
    if trigger is None:
        waits = f"{len(gathered.documents)} of {online.when.samples} new samples"
        return Due(gathered, state, waits=waits)
    learnt, held_out = split_rows(gathered.documents, learner.held_out_share, known.task)
    if why := lacking(learnt, held_out, learner.rows, known.noun):
        return Due(gathered, state, waits=f"{trigger}, but too little of it: {why}")
    return Due(gathered, state, "", trigger, (learnt, held_out))


def _trigger(state: LoopState, when: WhenSlice, samples: int, clock: Clock) -> str | None:
    if samples >= when.samples:
        return f"{samples} new samples"
    if when.minutes is not None and max(clock.since(state.learnt_at), clock.running()) >= 60 * when.minutes:
        return f"{when.minutes:g} minutes since the last update, {samples} new samples"
    if when.drift and drift.rise(state.drift) >= drift.ALARM:
        return f"drift: what is new became less usual, by {drift.rise(state.drift):.0f} spreads in all"
    return None


def _scored(state: LoopState, gathered: Gathered, known: LearningFrom, memory: Memory) -> LoopState:
    """What has come since it was last looked at, against the hold-out that the champion learnt last."""
    if gathered.fed_to <= state.drift.scored_to:
        return state
    rows = known.task.rows(gathered.after(state.drift.scored_to))
    if not len(rows):
        return state
    usual, fresh = known.task.surprise(known.task.load(known.champion), list(memory.held_out.values())[-1], rows)
    found = drift.watched(state.drift, fresh.tolist(), *drift.known(usual), gathered.fed_to)
    return state.model_copy(update={"drift": found})


def require_window(memory: Memory, task: LearningTask, window: int) -> None:
    width = memory.reservoir.rows.shape[1]
    if width != task.width:
        raise InputError(
            "online.learner.window", got=window, expected=f"{task.window_of(width)}, as the version's memory has it",
            fix="set it so; or move the loop's folder away, and it begins anew",
        )  # fmt: skip
