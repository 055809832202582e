"""Steps until a bound is reached: one update, some of them, or some time. Whatever is away comes back, or the bound
does."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from online.loop.records import UpdateRecord
from online.loop.steps import Loop
from runtime.backoff import pause_s
from runtime.errors import Unavailable

_LOOK_S = 1.0  # between two looks at a rollout
_POLL_S = 10.0  # between two looks at the store
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0


@dataclass(frozen=True)
class RunBounds:
    """`once`: until an update has ended, or nothing is to be done. None: no bound."""

    once: bool = False
    updates: int | None = None
    minutes: float | None = None


def run(
    loop: Loop,
    bounds: RunBounds,
    say: Callable[[str], None],
    ended: Callable[[UpdateRecord], None] = lambda update: None,
    *,
    sleep: Callable[[float], None] = time.sleep,
    monotonic: Callable[[], float] = time.monotonic,
) -> list[UpdateRecord]:
    """The updates that ended. `say` hears what is done, and what is waited for when that changes; `ended` of each.

    A store or a gateway that is away is waited for; with `once` it is raised.
    """
    start, found, waited, failures = monotonic(), list[UpdateRecord](), "", 0

    def over() -> bool:
        late = bounds.minutes is not None and monotonic() - start >= 60 * bounds.minutes
        enough = bounds.updates is not None and len(found) >= bounds.updates
        return late or enough or (bounds.once and bool(found))

    def pause(seconds: float) -> None:
        left = seconds if bounds.minutes is None else start + 60 * bounds.minutes - monotonic()
        sleep(max(min(seconds, left), 0.0))

    while not over():
        try:
            step = loop.step()
        except Unavailable as error:
            if bounds.once:
                raise
            failures += 1
            if waited != (waited := str(error)):
                say(f"waits: {waited}")
            pause(pause_s(failures, _FIRST_PAUSE_S, _LONGEST_PAUSE_S))
            continue
        failures = 0
        if step.ended is not None:
            found.append(step.ended)
            ended(step.ended)
        if step.waits:
            if waited != (waited := step.said):
                say(f"waits: {waited}")
            if bounds.once:
                break
            pause(_POLL_S)
            continue
        waited = ""
        if step.said:
            say(step.said)
        if step.looks:
            pause(_LOOK_S)
    return found
