"""Whether an update begins now, why, and with which rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from builders.spec import OnlineSlice, WhenSlice
from builders.training.text import TokenIds
from online.gate.forgetting import row_losses
from online.gate.verdict import load_model
from online.learner.memory import Memory, load_memory
from online.loop import drift
from online.loop.records import LoopState
from online.loop.texts import Gathered, gather, lacking, rows_of, split_rows
from runtime.errors import InputError
from runtime.tokenizer_file import open_tokenizer


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
    rows: tuple[TokenIds, TokenIds] | None = None


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


def look(state: LoopState, online: OnlineSlice, store: Samples, checkpoint: Path, end: int, clock: Clock) -> Due:
    """Reads what has come since the last update. Raises FeedbackUnavailable; InputError for a memory that does not go
    with the spec."""
    learner, memory = online.learner, load_memory(checkpoint)
    _require_window(memory, learner.window)
    gathered = gather(store.read(state.fed_to), state.fed_to, learner.min_rating)
    if not gathered.documents:
        more = f" ({gathered.unread} that say nothing to a language model)" if gathered.unread else ""
        return Due(gathered, state, waits=f"no new feedback to learn from{more}")
    tokenizer = open_tokenizer(checkpoint / "tokenizer.json")
    if online.when.drift:
        state = _scored(state, gathered, checkpoint, memory, tokenizer, end)
    trigger = _trigger(state, online.when, len(gathered.documents), clock)
    if trigger is None:
        waits = f"{len(gathered.documents)} of {online.when.samples} new samples"
        return Due(gathered, state, waits=waits)
    learnt, held_out = split_rows(gathered.documents, learner.held_out_share, tokenizer, end, learner.window)
    if why := lacking(learnt, held_out, learner.rows):
        return Due(gathered, state, waits=f"{trigger}, but too little text: {why}")
    return Due(gathered, state, "", trigger, (learnt, held_out))


def _trigger(state: LoopState, when: WhenSlice, samples: int, clock: Clock) -> str | None:
    if samples >= when.samples:
        return f"{samples} new samples"
    if when.minutes is not None and max(clock.since(state.learnt_at), clock.running()) >= 60 * when.minutes:
        return f"{when.minutes:g} minutes since the last update, {samples} new samples"
    if when.drift and drift.rise(state.drift) >= drift.ALARM:
        return f"drift: losses on new text rose by {drift.rise(state.drift):.0f} spreads in all"
    return None


def _scored(
    state: LoopState, gathered: Gathered, checkpoint: Path, memory: Memory, tokenizer: Any, end: int
) -> LoopState:
    """The champion's losses on text that has come since it was last scored, against those on the hold-out that it
    learnt last."""
    if gathered.fed_to <= state.drift.scored_to:
        return state
    fresh = gathered.after(state.drift.scored_to)
    rows = rows_of(fresh, tokenizer, end, memory.reservoir.rows.shape[1] - 1)
    if not len(rows):
        return state
    model = load_model(checkpoint)
    usual = drift.known(row_losses(model, list(memory.held_out.values())[-1]))
    found = drift.watched(state.drift, row_losses(model, rows).tolist(), *usual, gathered.fed_to)
    return state.model_copy(update={"drift": found})


def _require_window(memory: Memory, window: int) -> None:
    width = memory.reservoir.rows.shape[1]
    if width != window + 1:
        raise InputError(
            "online.learner.window", got=window, expected=f"{width - 1}, as the version's memory has it",
            fix="set it so; or move the loop's folder away, and it begins anew",
        )  # fmt: skip
