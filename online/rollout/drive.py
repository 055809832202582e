"""Carries a rollout out over two seams, and writes each state down before it acts on it.

A crash leaves a state; whoever opens the journal next brings about what that state wants, and goes on. Requests that
were dealt out meanwhile, by nobody knows which share, are left out of the evidence.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from pydantic import ValidationError

from online.files import lock_beside, replace_file
from online.rollout.policy import RolloutPolicy
from online.rollout.seen import VersionCounters
from online.rollout.state import ENDED, BothCounters, Phase, RolloutState, WantedServing, enter, judge, wanted
from runtime.errors import InputError, ServerFault
from runtime.record import Record

_LONGEST_LOOK_S = 60.0  # more passed while nobody looked: a sleep of the machine is no time of the rollout's


class CanaryDoor(Protocol):
    """The gateway. Each request goes to one version by chance, by these shares and nothing else of the request."""

    def route(self, shares: Mapping[int, float], mirror: int | None) -> None:
        """Holds for every request that comes after the return. Asking again for the same changes nothing."""

    def counters(self) -> Mapping[int, VersionCounters]:
        """Since the door's start. A mirrored request counts at the version that got the copy too."""


class LoadedVersions(Protocol):
    """Where models are loaded. Asking again for what is so already changes nothing."""

    def load(self, version: int) -> None:
        """Beside what is loaded. Returns when it is ready and proven. Raises ServerFault when it is not."""

    def unload(self, version: int) -> None: ...


class _ChallengerLost(Exception):
    """The new version does not load, at first or again after a crash, while the old one could serve alone."""


class _Entry(Record):
    policy: RolloutPolicy
    state: RolloutState


class Journal:
    """One file. A lock beside it keeps a second process out, and goes with the process."""

    def __init__(self, path: Path) -> None:
        """Raises MachineError when another process has it."""
        self.path = path
        self._lock = lock_beside(path, "rollout")

    def load(self) -> _Entry | None:
        """None when nothing was begun. Raises InputError for a file that is not a journal's."""
        try:
            return _Entry.model_validate_json(self.path.read_bytes())
        except FileNotFoundError:
            return None
        except ValidationError as error:
            raise InputError(
                f"rollout {self.path}",
                got=str(error.errors(include_url=False, include_input=False)[0]["msg"]),
                expected="a journal of this Trireme",
                fix="finish the rollout with the Trireme that began it, or remove the file and roll back by hand",
            ) from error

    def save(self, policy: RolloutPolicy, state: RolloutState) -> None:
        replace_file(self.path, _Entry(policy=policy, state=state).model_dump_json(indent=1).encode())

    def close(self) -> None:
        self._lock.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Rollout:
    """Owned by one thread. `step` is one look; call it until `ended`."""

    def __init__(
        self,
        journal: Journal,
        door: CanaryDoor,
        versions: LoadedVersions,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Goes on with what the journal holds. Raises InputError when it holds nothing: `begin` comes first."""
        found = journal.load()
        if found is None:
            raise InputError(f"rollout {journal.path}", got="nothing", expected="one that was begun", fix="begin one")
        self._journal, self._door, self._versions, self._clock = journal, door, versions, clock
        # Which share was in force since the last look is not known any more.
        self.policy, self.state = found.policy, found.state.model_copy(update={"baseline": None})
        self._looked: float | None = None

    @property
    def ended(self) -> bool:
        return self.state.phase in ENDED

    def step(self) -> RolloutState:
        """Brings about what the state wants, looks, decides, and writes the decision down. Once `ended`, the first call
        has brought the end about. A new version that does not load is rolled back. What the seams raise else goes
        through; the next call, or process, goes on."""
        try:
            self._bring_about(wanted(self.state, self.policy))
        except _ChallengerLost as lost:
            self._save(enter(self.state, self.policy, Phase.ROLLED_BACK, f"it does not load: {lost.__cause__}"))
        if not self.ended:
            self._save(self._next())
        if self.ended:
            self._bring_about(wanted(self.state, self.policy))
        return self.state

    def roll_back(self, reason: str) -> RolloutState:
        """By a person's word. Raises InputError after the promotion: the old version is not loaded any more."""
        if self.state.phase is Phase.PROMOTED:
            raise InputError(
                f"version {self.state.challenger}",
                got="a rollout that was promoted",
                expected="one under way",
                fix=f"roll out version {self.state.champion}, as a new rollout",
            )
        if not self.ended:
            self._save(enter(self.state, self.policy, Phase.ROLLED_BACK, reason))
        self._bring_about(wanted(self.state, self.policy))
        return self.state

    def _next(self) -> RolloutState:
        if self.state.phase is Phase.STARTING:
            return enter(self.state, self.policy, Phase.PROVEN, "it is loaded, and its outputs are the reference's")
        if self.state.phase is Phase.PROVEN:
            return enter(self.state, self.policy, Phase.MIRRORED, "it is proven")
        now, before = self._clock(), self._looked
        self._looked = now
        seconds = 0.0 if before is None else min(max(now - before, 0.0), _LONGEST_LOOK_S)
        found = self._door.counters()
        counted = BothCounters(
            champion=found.get(self.state.champion, VersionCounters()),
            challenger=found.get(self.state.challenger, VersionCounters()),
        )
        return judge(self.state, self.policy, counted, seconds)

    def _bring_about(self, want: WantedServing) -> None:
        """Loaded before it gets requests, without requests before it is unloaded."""
        for version in want.loaded:
            try:
                self._versions.load(version)
            except ServerFault as error:
                if version == self.state.challenger and not self.ended:
                    raise _ChallengerLost from error
                raise
        self._door.route(want.shares, want.mirror)
        for version in {self.state.champion, self.state.challenger} - set(want.loaded):
            self._versions.unload(version)

    def _save(self, state: RolloutState) -> None:
        """On the disk first: nothing is done in the world that a crash could make us forget."""
        self._journal.save(self.policy, state)
        self.state = state


def begin(journal: Journal, policy: RolloutPolicy, champion: int, challenger: int) -> None:
    """Raises InputError when a rollout is under way, or for a version against itself."""
    found = journal.load()
    if found is not None and found.state.phase not in ENDED:
        under_way = f"version {found.state.challenger} under way ({found.state.phase})"
        raise InputError(f"rollout {journal.path}", got=under_way, expected="none", fix="finish it, or roll it back")
    if champion == challenger or min(champion, challenger) < 1:
        got = f"{champion} and {challenger}"
        raise InputError("versions", got=got, expected="two different ones, from 1", fix="name the new version")
    journal.save(policy, RolloutState(champion=champion, challenger=challenger))
