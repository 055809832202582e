"""The rollout with a crash at any moment: there is always a version that serves, and somebody else can go on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from online.rollout.drive import Journal, Rollout, begin
from online.rollout.policy import Metric, RolloutPolicy
from online.rollout.seen import SCORES, VersionCounters
from online.rollout.state import BothCounters, Phase, RolloutState, enter, judge
from runtime.errors import InputError, MachineError, ServerFault

OLD, NEW = 3, 4
LOOK = 1000  # requests between two looks
QUICK = RolloutPolicy(
    margins={Metric.ERRORS: 0.2}, mirrored_requests=40, step_requests=10, soak_requests=100, most_requests=20_000
)


class Crash(BaseException):
    """As kill -9: nobody catches it."""


@dataclass
class World:
    """CanaryDoor and server, which live on when the rollout's process dies. Every look finds as many requests more."""

    failing: Mapping[int, float] = field(default_factory=dict)  # share of a version's requests
    broken: bool = False  # the new version does not load
    hides: bool = False  # the new version fails with real requests only, not with mirrored ones
    seed: int = 0
    crashes: set[int] = field(default_factory=set)  # by number of the call, before and after its effect
    loaded: set[int] = field(default_factory=lambda: {OLD})
    shares: dict[int, float] = field(default_factory=lambda: {OLD: 1.0})
    mirror: int | None = None
    calls: int = 0
    history: list[float] = field(default_factory=list)  # of the new version's share

    def __post_init__(self) -> None:
        self._random = np.random.default_rng(self.seed)
        self._seen = {version: [0, 0] for version in (OLD, NEW)}

    def _at(self) -> None:
        self.calls += 1
        if self.calls in self.crashes:
            raise Crash

    def _effect(self, effect: Callable[[], None]) -> None:
        self._at()
        effect()
        assert set(self.shares) <= self.loaded, "requests go to a version that is not loaded"
        assert abs(sum(self.shares.values()) - 1) < 1e-9
        assert self.mirror is None or self.mirror in self.loaded
        self._at()

    def load(self, version: int) -> None:
        if self.broken and version == NEW:
            raise ServerFault("its engine is for another GPU")
        self._effect(lambda: self.loaded.add(version))

    def unload(self, version: int) -> None:
        self._effect(lambda: self.loaded.discard(version))

    def route(self, shares: Mapping[int, float], mirror: int | None) -> None:
        def effect() -> None:
            self.shares, self.mirror = dict(shares), mirror
            self.history.append(shares.get(NEW, 0.0))

        self._effect(effect)

    def counters(self) -> Mapping[int, VersionCounters]:
        self._at()
        new = int(self._random.binomial(LOOK, self.shares.get(NEW, 0.0)))
        for version, requests in ((OLD, LOOK - new), (NEW, LOOK if self.mirror else new)):
            self._seen[version][0] += requests
            rate = 0.0 if version == self.mirror and self.hides else self.failing.get(version, 0.0)
            self._seen[version][1] += int(self._random.binomial(requests, rate))
        return {version: VersionCounters(requests=n, errors=bad) for version, (n, bad) in self._seen.items()}

    def restart_door(self) -> None:
        self._seen = {version: [0, 0] for version in (OLD, NEW)}


class CrashingJournal(Journal):
    """May die just before the new state is written, or just after."""

    def __init__(self, path: Path, world: World) -> None:
        super().__init__(path)
        self._world = world

    def save(self, policy: RolloutPolicy, state: RolloutState) -> None:
        self._world._at()
        super().save(policy, state)
        self._world._at()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "rollout.json"


def run_to_the_end(path: Path, world: World, policy: RolloutPolicy = QUICK) -> RolloutState:
    """New processes until one ends it; each crash is one process."""
    with Journal(path) as journal:
        begin(journal, policy, OLD, NEW)
    for _ in range(len(world.crashes) + 1):
        journal = CrashingJournal(path, world)
        try:
            rollout = Rollout(journal, world, world)
            for _ in range(2000):
                state = rollout.step()
                if rollout.ended:
                    return state
            raise AssertionError("it does not end")
        except Crash:
            continue
        finally:
            journal.close()
    raise AssertionError("more crashes than were planned")


def require_end(state: RolloutState, world: World, phase: Phase) -> None:
    serving = NEW if phase is Phase.PROMOTED else OLD
    assert state.phase is phase
    assert (world.loaded, world.shares, world.mirror) == ({serving}, {serving: 1.0}, None)


def require_small_steps(world: World) -> None:
    """No process ever gave the new version more than the next step, and none went on after the way back."""
    steps = [0.0, *QUICK.steps]
    for before, after in zip([0.0, *world.history], world.history, strict=False):
        assert after == 0.0 or steps.index(after) - steps.index(before) <= 1


crash_points = st.sets(st.integers(1, 90), max_size=6)


@given(crashes=crash_points, seed=st.integers(0, 1000))
@settings(max_examples=25)
def test_a_good_version_is_promoted_whatever_crashes(crashes: set[int], seed: int) -> None:
    with TemporaryDirectory() as folder:
        world = World(crashes=crashes, seed=seed)
        require_end(run_to_the_end(Path(folder) / "r", world), world, Phase.PROMOTED)
        require_small_steps(world)


@given(crashes=crash_points, seed=st.integers(0, 1000), rate=st.sampled_from([0.6, 1.0]), hides=st.booleans())
@settings(max_examples=25)
def test_a_bad_version_is_rolled_back_whatever_crashes(crashes: set[int], seed: int, rate: float, hides: bool) -> None:
    with TemporaryDirectory() as folder:
        world = World({NEW: rate}, hides=hides, crashes=crashes, seed=seed)
        state = run_to_the_end(Path(folder) / "r", world)
        require_end(state, world, Phase.ROLLED_BACK)
        assert "errors are worse" in state.decisions[-1].reason
        assert max(world.history) <= QUICK.steps[1]


@pytest.mark.parametrize(
    ("rate", "hides", "phase"),
    [(0.0, False, Phase.PROMOTED), (0.9, False, Phase.ROLLED_BACK), (0.9, True, Phase.ROLLED_BACK)],
)
def test_a_crash_at_each_call_in_turn(tmp_path: Path, rate: float, hides: bool, phase: Phase) -> None:
    """Each moment before and after each effect and each write of a whole rollout, one after the other."""
    undisturbed = World({NEW: rate}, hides=hides)
    run_to_the_end(tmp_path / "all", undisturbed)
    assert undisturbed.calls > 20
    assert max(undisturbed.history) == (1.0 if rate == 0 else QUICK.steps[0] if hides else 0.0)
    for call in range(1, undisturbed.calls + 1):
        world = World({NEW: rate}, hides=hides, crashes={call})
        require_end(run_to_the_end(tmp_path / str(call), world), world, phase)
        require_small_steps(world)


def test_a_version_that_does_not_load_is_rolled_back(path: Path) -> None:
    world = World(broken=True)
    state = run_to_the_end(path, world)
    require_end(state, world, Phase.ROLLED_BACK)
    assert "its engine is for another GPU" in state.decisions[-1].reason


def test_a_version_that_does_not_load_again_after_a_crash_is_rolled_back(path: Path) -> None:
    """In the middle of the canary, when the server is new and has the old version alone."""
    world = World()
    with Journal(path) as journal:
        begin(journal, QUICK, OLD, NEW)
        rollout = Rollout(journal, world, world)
        while rollout.state.phase is not Phase.CANARY:
            rollout.step()
    world.broken, world.loaded, world.shares, world.mirror = True, {OLD}, {OLD: 1.0}, None
    with Journal(path) as journal:
        require_end(Rollout(journal, world, world).step(), world, Phase.ROLLED_BACK)


def test_a_champion_that_is_lost_is_an_error_and_no_decision(path: Path) -> None:
    world = World()

    class Lost(World):
        def load(self, version: int) -> None:
            raise ServerFault("no server")

    with Journal(path) as journal:
        begin(journal, QUICK, OLD, NEW)
        with pytest.raises(ServerFault, match="no server"):
            Rollout(journal, world, Lost()).step()
        assert Rollout(journal, world, world).state.phase is Phase.STARTING


def test_a_door_that_starts_again_leaves_its_requests_out(path: Path) -> None:
    world = World()
    with Journal(path) as journal:
        begin(journal, QUICK, OLD, NEW)
        rollout = Rollout(journal, world, world)
        while rollout.state.phase is not Phase.CANARY:
            rollout.step()
        rollout.step()
        rollout.step()
        before = rollout.state
        world.restart_door()
        after = rollout.step()
    assert (after.harm, after.requests) == (before.harm, before.requests)


def test_no_requests_promote_nothing() -> None:
    state = enter(RolloutState(champion=OLD, challenger=NEW), QUICK, Phase.CANARY, "", 2)
    for _ in range(1000):
        state = judge(state, QUICK, BothCounters(), 60.0)
    assert (state.phase, state.step) == (Phase.CANARY, 2)
    state = judge(state, QUICK, BothCounters(), 60 * 600.0)
    assert state.phase is Phase.ROLLED_BACK
    assert "no evidence" in state.decisions[-1].reason


def _counted(old: int, new: int, old_bad: int = 0, new_bad: int = 0, rated: int = 0) -> BothCounters:
    scores = (0,) * (SCORES - 1) + (rated,)
    return BothCounters(
        champion=VersionCounters(requests=old, errors=old_bad, scores=scores),
        challenger=VersionCounters(requests=new, errors=new_bad, scores=scores),
    )


def test_quality_that_nobody_rated_promotes_nothing() -> None:
    policy = RolloutPolicy(margins={Metric.ERRORS: 0.01, Metric.QUALITY: 0.05})
    state = judge(
        enter(RolloutState(champion=OLD, challenger=NEW), policy, Phase.CANARY, "", 2), policy, BothCounters(), 1
    )
    state = judge(state, policy, _counted(20_000, 20_000), 1)
    assert policy.steps[state.step] == 0.5
    state = judge(state, policy, _counted(20_001, 20_001, rated=2000), 1)
    assert policy.steps[state.step] == 1


def test_a_version_that_fails_with_all_of_the_traffic_goes_back() -> None:
    """Nothing is left to compare it with but what the old one showed before."""
    state = enter(RolloutState(champion=OLD, challenger=NEW), QUICK, Phase.CANARY, "", 2)
    state = judge(state, QUICK, BothCounters(), 1)
    state = judge(state, QUICK, _counted(3000, 3000), 1)
    assert QUICK.steps[state.step] == 1
    state = judge(state, QUICK, _counted(3000, 3000), 1)
    state = judge(state, QUICK, _counted(3000, 3050, new_bad=40), 1)
    assert state.phase is Phase.ROLLED_BACK


def test_a_slow_version_is_stopped_though_nothing_fails() -> None:
    policy = RolloutPolicy(margins={Metric.ERRORS: 0.01, Metric.SLOW: 0.02})
    state = judge(
        enter(RolloutState(champion=OLD, challenger=NEW), policy, Phase.CANARY, "", 1), policy, BothCounters(), 1
    )
    slow = VersionCounters(requests=60, slow=40)
    state = judge(state, policy, BothCounters(champion=VersionCounters(requests=500, slow=5), challenger=slow), 1)
    assert state.phase is Phase.ROLLED_BACK
    assert state.decisions[-1].reason.startswith("slow")


def test_a_person_may_roll_back_until_the_promotion(path: Path) -> None:
    world = World()
    with Journal(path) as journal:
        begin(journal, QUICK, OLD, NEW)
        rollout = Rollout(journal, world, world)
        while rollout.state.phase is not Phase.CANARY:
            rollout.step()
        require_end(rollout.roll_back("I do not like it"), world, Phase.ROLLED_BACK)
        begin(journal, QUICK, OLD, NEW)
        rollout = Rollout(journal, world, world)
        while not rollout.ended:
            rollout.step()
        with pytest.raises(InputError, match="promoted"):
            rollout.roll_back("too late")


def test_time_that_jumps_is_no_time_of_the_rollout(path: Path) -> None:
    now = iter([0.0, 10.0, 1e9, 5.0, *[6.0] * 1000])
    world = World()
    with Journal(path) as journal:
        begin(journal, QUICK.model_copy(update={"mirrored_requests": 10_000}), OLD, NEW)
        rollout = Rollout(journal, world, world, clock=lambda: next(now))
        for _ in range(7):
            state = rollout.step()
    assert state.elapsed_s == 10 + 60 + 0 + 1


def test_one_process_at_a_time_and_one_rollout_at_a_time(path: Path) -> None:
    with Journal(path) as journal:
        with pytest.raises(InputError, match="got nothing"):
            Rollout(journal, World(), World())
        with pytest.raises(MachineError, match="another process"):
            Journal(path)
        begin(journal, QUICK, OLD, NEW)
        with pytest.raises(InputError, match="under way"):
            begin(journal, QUICK, NEW, 5)
    with Journal(path) as journal:
        path.write_text('{"policy": 3}')
        with pytest.raises(InputError, match="a journal of this Trireme"):
            journal.load()


def test_a_write_that_was_cut_short_changes_nothing(path: Path) -> None:
    with Journal(path) as journal:
        begin(journal, QUICK, OLD, NEW)
        path.with_name(f".{path.name}.new").write_text('{"half')
        assert Rollout(journal, World(), World()).state.phase is Phase.STARTING


@pytest.mark.parametrize(
    "bad",
    [
        {"margins": {}},
        {"margins": {"errors": 0}},
        {"margins": {"colour": 0.1}},
        {"shares": (0.1, 0.1)},
        {"shares": (0.1, 1.0)},
        {"shares": ()},
        {"alpha": 0},
        {"speed": 1},
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        RolloutPolicy.model_validate(bad)


def test_counters_that_do_not_add_up_are_refused() -> None:
    for bad in ({"requests": 1, "errors": 2}, {"scores": (1, 2)}, {"requests": -1}):
        with pytest.raises(ValidationError):
            VersionCounters.model_validate(bad)
