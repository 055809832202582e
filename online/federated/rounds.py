"""The state machine of a round: who is there, who has answered, and when it ends. Time is an argument.

GATHERING -> OPEN -> COMPLETE -> GATHERING ... -> DONE. A round below its minimum at its deadline is tried again from
the same weights, SHORT of `attempts` times it is STOPPED. Nothing that a client does, or leaves undone, ends a round
early or keeps it from ending.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from online.federated.plan import FederatedPlan

ALIVE_S = 45.0  # since a client was heard of; one that waits for a round asks every ten seconds


class RoundPhase(StrEnum):
    GATHERING = "gathering"  # clients come
    OPEN = "open"  # they learn
    COMPLETE = "complete"  # enough have answered: their updates are to be joined
    STOPPED = "stopped"  # too few, too often
    DONE = "done"  # all rounds


class UpdateAnswer(StrEnum):
    ACCEPTED = "accepted"
    REJECTED = "rejected"  # it counts for nothing; the client may come back in the next round
    LATE = "late"  # for a round, or a try of one, that is over
    TWICE = "twice"  # the first answer of a client stands


@dataclass
class Rounds:
    """`number`: rounds that are complete, and so the number of the one under way, from 0. Owned by one lock."""

    plan: FederatedPlan
    number: int
    since: float  # when the phase began
    attempt: int = 1
    phase: RoundPhase = RoundPhase.GATHERING
    present: dict[str, float] = field(default_factory=dict)  # when each was heard of last
    expected: set[str] = field(default_factory=set)
    accepted: set[str] = field(default_factory=set)
    rejected: dict[str, str] = field(default_factory=dict)
    first: bool = True  # of this process: clients are waited for, not only for the fewest

    def __post_init__(self) -> None:
        if self.number >= self.plan.rounds:
            self.phase = RoundPhase.DONE

    def seen(self, client: str, now: float) -> None:
        self.present[client] = now

    def take(self, client: str, now: float) -> bool:
        """Whether the client gets the round that is open. One that asks again, as it died, gets it again."""
        self.seen(client, now)
        if self.phase is not RoundPhase.OPEN or client in self._answered:
            return False
        self.expected.add(client)
        return True

    def is_open(self, number: int, attempt: int) -> bool:
        return (self.phase, self.number, self.attempt) == (RoundPhase.OPEN, number, attempt)

    def answer(self, client: str, number: int, attempt: int, why: str | None, now: float) -> UpdateAnswer:
        """`why`: the fault of an update that must not count."""
        self.seen(client, now)
        if not self.is_open(number, attempt):
            return UpdateAnswer.LATE
        if client in self._answered:
            return UpdateAnswer.TWICE
        self.expected.add(client)
        if why is not None:
            self.rejected[client] = why
            return UpdateAnswer.REJECTED
        self.accepted.add(client)
        return UpdateAnswer.ACCEPTED

    def tick(self, now: float) -> None:
        """Goes on as far as time and answers let it."""
        if self.phase is RoundPhase.GATHERING:
            alive = self._alive(now)
            wanted = (self.plan.clients or self.plan.min_clients) if self.first else self.plan.min_clients
            waited = now - self.since >= self.plan.gather_s
            if len(alive) >= (self.plan.min_clients if waited else wanted):
                self._enter(RoundPhase.OPEN, now)
                self.expected, self.first = alive, False
            elif now >= self.deadline:
                self._try_again(now)
        elif self.phase is RoundPhase.OPEN:
            enough = len(self.accepted) >= self.plan.min_clients
            if enough and (self.expected <= self._answered or now >= self.deadline):
                self._enter(RoundPhase.COMPLETE, now)
            elif now >= self.deadline:
                self._try_again(now)

    @property
    def deadline(self) -> float:
        """Of the phase. Later than that, `tick` ends it."""
        return self.since + self.plan.deadline_s

    @property
    def missing(self) -> set[str]:
        """Stragglers, and clients that were lost."""
        return self.expected - self._answered

    def reject(self, client: str, why: str) -> None:
        """An update that was accepted, once it is seen beside the others."""
        self.accepted.discard(client)
        self.rejected[client] = why

    def joined(self, now: float) -> None:
        """The updates of a COMPLETE round are in the weights, or too few of them were left: then it is tried again."""
        if len(self.accepted) < self.plan.min_clients:
            self._try_again(now)
            return
        self._forget(now)
        self.number, self.attempt = self.number + 1, 1
        self._enter(RoundPhase.DONE if self.number == self.plan.rounds else RoundPhase.GATHERING, now)

    @property
    def _answered(self) -> set[str]:
        return self.accepted | self.rejected.keys()

    def _alive(self, now: float) -> set[str]:
        return {client for client, at in self.present.items() if now - at < ALIVE_S}

    def _try_again(self, now: float) -> None:
        self._forget(now)
        if self.attempt >= self.plan.attempts:
            self._enter(RoundPhase.STOPPED, now)
        else:
            self.attempt += 1
            self._enter(RoundPhase.GATHERING, now)

    def _forget(self, now: float) -> None:
        """Who did not answer is waited for again only once it is heard of; who did is there."""
        for client in self.missing:
            self.present.pop(client, None)
        self.present.update(dict.fromkeys(self._answered, now))
        self.expected, self.accepted, self.rejected = set(), set(), {}

    def _enter(self, phase: RoundPhase, now: float) -> None:
        self.phase, self.since = phase, now
