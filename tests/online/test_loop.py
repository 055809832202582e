"""The loop with a crash at any call: there is a version that serves, and whoever comes next goes on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from online.loop.asked import ask_back
from online.loop.journal import LoopJournal
from online.loop.records import LoopState, UpdateStage
from online.loop.run import RunBounds, run
from runtime.errors import InputError, MachineError, Unavailable
from tests.online.loop_world import Everything, Samples, ran, save_first, spoken
from tests.online.test_rollout import NEW, OLD, World

ROWS = spoken(2, 120)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_first(tmp_path_factory.mktemp("first") / "model")


@pytest.fixture
def everything(first: Path, tmp_path: Path) -> Everything:
    return Everything(tmp_path, first, Samples(list(ROWS)))


def require_whole(found: Everything, state: LoopState, stage: UpdateStage, last: int = ROWS[-1][0]) -> None:
    """What serves, what a restart would serve and what is written down are one."""
    serving = NEW if stage is UpdateStage.PROMOTED else OLD
    journal = found.folder / "tiny" / "online"
    with LoopJournal(found.folder, "tiny") as files:
        (record,) = files.ended()
        assert files.checkpoint(state.champion.update).is_dir()
    assert record.stage is stage
    assert record.reason
    assert state.champion.version == serving == found.current
    assert state.update is None
    assert state.fed_to == last
    assert serving in found.published
    if found.world.history:
        assert (found.world.loaded, found.world.shares, found.world.mirror) == ({serving}, {serving: 1.0}, None)
    assert not list(journal.glob("updates/*/rows.npy")), "somebody's text lies about"
    kept = {file.parent.name for file in journal.glob("updates/*/checkpoint")}
    assert kept == ({"0000", "0001"} if stage is UpdateStage.PROMOTED else {"0000"})


crash_points = st.sets(st.integers(1, 130), max_size=6)


def lived(
    first: Path, crashes: set[int], world: World, samples: Sequence[Any] = ROWS, **of: str
) -> Iterator[tuple[Everything, LoopState]]:
    with TemporaryDirectory() as folder:
        world.crashes = crashes
        found = Everything(Path(folder), first, Samples(list(samples)), world, **of)  # type: ignore[arg-type]
        yield found, ran(found)


@given(crashes=crash_points, seed=st.integers(0, 1000))
@settings(max_examples=10, deadline=None)
def test_a_good_update_is_promoted_whatever_crashes(first: Path, crashes: set[int], seed: int) -> None:
    for found, state in lived(first, crashes, World(seed=seed)):
        require_whole(found, state, UpdateStage.PROMOTED)


@given(crashes=crash_points, kind=st.sampled_from(["failing", "broken", "gate", "pipeline"]))
@settings(max_examples=12, deadline=None)
def test_a_bad_update_never_stays_whatever_crashes(first: Path, crashes: set[int], kind: str) -> None:
    world = World(failing={NEW: 0.5} if kind == "failing" else {}, broken=kind == "broken")
    for found, state in lived(first, crashes, world, refuses=kind):
        before_the_world = kind in ("gate", "pipeline")
        require_whole(found, state, UpdateStage.REFUSED if before_the_world else UpdateStage.ROLLED_BACK)
        if before_the_world:
            assert found.world.history == [], "a refused candidate was given requests"


@pytest.mark.slow
def test_a_crash_at_each_single_call(first: Path) -> None:
    for kind in ("", "failing"):
        for at in range(1, 110):
            world = World(failing={NEW: 0.5} if kind else {})
            for found, state in lived(first, {at}, world):
                require_whole(found, state, UpdateStage.ROLLED_BACK if kind else UpdateStage.PROMOTED)


def test_the_next_update_starts_from_the_last_and_reads_on(everything: Everything) -> None:
    ran(everything)
    everything.samples.rows += spoken(3, 120, first=121)
    everything.without_canary = True
    state = ran(everything, updates=2)
    assert [item.version for item in state.promoted] == [OLD, NEW, NEW + 1]
    with LoopJournal(everything.folder, "tiny") as files:
        one, two = files.ended()
    assert (two.champion, two.samples, one.fed_to, two.fed_to) == (NEW, 120, 120, 240)


def test_what_was_refused_is_not_tried_again(everything: Everything) -> None:
    everything.refuses = "gate"
    state = ran(everything)
    with everything.process() as loop:
        step = loop.step()
    assert step.waits
    assert "no new feedback" in step.said
    assert state.fed_to == 120


def test_an_empty_store_and_too_little_text_are_waited_out_with_words(everything: Everything) -> None:
    everything.samples.rows = []
    said = []
    for rows in ([], ROWS[:40]):
        everything.samples.rows = rows
        with everything.process() as loop:
            loop.step()
            said.append(loop.step().said)
    everything.online = {"when": {"samples": 10}}
    everything.samples.rows = ROWS[:12]
    with everything.process() as loop:
        said.append(loop.step().said)
    assert said[0] == "no new feedback to learn from"
    assert said[1] == "40 of 100 new samples"
    assert said[2].startswith("12 new samples, but too little of it: ")


def test_a_store_that_goes_away_is_waited_for_and_once_is_told(everything: Everything) -> None:
    ran_before, slept, said = everything, [], []
    ran_before.samples.away = True

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        ran_before.samples.away = len(slept) < 3

    with everything.process() as loop:
        found = run(loop, RunBounds(updates=1), said.append, sleep=sleep, monotonic=lambda: 0.0)
    assert [item.stage for item in found] == [UpdateStage.PROMOTED]
    assert slept[:3] == [1.0, 2.0, 4.0]
    assert [line for line in said if "away" in line] == ["waits: the feedback database cannot be used now: it is away"]
    everything.samples.away = True
    with everything.process() as loop, pytest.raises(Unavailable):
        run(loop, RunBounds(once=True), said.append)


def test_minutes_bound_a_run_that_waits(everything: Everything) -> None:
    everything.samples.rows, clock, said = [], [0.0], []

    def sleep(seconds: float) -> None:
        clock[0] += seconds

    with everything.process() as loop:
        found = run(loop, RunBounds(minutes=1), said.append, sleep=sleep, monotonic=lambda: clock[0])
    assert found == []
    assert clock[0] == 60
    assert said[1:] == ["waits: no new feedback to learn from"]


@pytest.mark.parametrize(("jump", "due"), [(-1e6, False), (0.0, False), (1e6, True)])
def test_a_clock_that_jumps_begins_an_update_early_or_by_the_other_clock(
    everything: Everything, jump: float, due: bool
) -> None:
    """`minutes` by the wall clock, which counts over restarts; by how long the process runs where that goes back."""
    everything.online = {"when": {"samples": 1000, "minutes": 10}}
    with everything.process() as loop:
        loop.step()
        everything.wall += jump
        everything.mono += 300
        assert loop.step().waits is not due
        if not due:
            everything.mono += 301
            assert not loop.step().waits


def test_nothing_served_waits_with_what_is_built_until_it_is_told_otherwise(everything: Everything) -> None:
    everything.serves = False
    with everything.process() as loop:
        found = run(loop, RunBounds(once=True), lambda said: None)
        step = loop.step()
    assert found == []
    assert step.waits
    assert "waits for a rollout" in step.said
    assert (everything.current, NEW in everything.published) == (OLD, True)
    everything.without_canary = True
    state = ran(everything)
    require_whole(everything, state, UpdateStage.PROMOTED)


def test_a_person_takes_back_an_update_or_the_champion_once(everything: Everything) -> None:
    ran(everything)
    with LoopJournal(everything.folder, "tiny") as files:
        assert ask_back(files, "it swears") == f"version {NEW}, back to {OLD}"
    with everything.process() as loop:
        assert "it swears" in loop.step().said
        assert loop.step().said == "no new feedback to learn from"
        state = loop.journal.load()
    assert state is not None
    require_whole(everything, state, UpdateStage.ROLLED_BACK)
    with LoopJournal(everything.folder, "tiny") as files, pytest.raises(InputError, match="the first one"):
        ask_back(files, "again")


@given(crashes=st.sets(st.integers(60, 110), max_size=4))
@settings(max_examples=6, deadline=None)
def test_a_word_that_comes_at_any_time_is_carried_out_whatever_crashes(first: Path, crashes: set[int]) -> None:
    """It comes while the version is a canary; what follows dies here and there."""
    with TemporaryDirectory() as folder:
        found = Everything(Path(folder), first, Samples(list(ROWS)))
        with found.process() as loop:
            while not found.world.history or found.world.history[-1] == 0:
                loop.step()
            ask_back(loop.journal, "stop")
        found.world.crashes = {found.world.calls + place - 60 for place in crashes}
        require_whole(found, ran(found), UpdateStage.ROLLED_BACK)


def test_another_model_under_the_same_name_is_refused(everything: Everything, tmp_path: Path) -> None:
    with everything.process() as loop:
        loop.step()
    everything.first = save_first(tmp_path / "another")
    with everything.process() as loop, pytest.raises(InputError, match="other weights or settings"):
        loop.step()


def test_one_process_at_a_time(everything: Everything) -> None:
    with everything.process(), pytest.raises(MachineError, match="another process"):
        LoopJournal(everything.folder, "tiny")


def test_damaged_files_are_refused_by_name(everything: Everything) -> None:
    ran(everything)
    with LoopJournal(everything.folder, "tiny") as files:
        files.state_file.write_text('{"origin": 3}')
        with pytest.raises(InputError, match=r"loop\.json"):
            files.load()


def test_a_candidate_is_timed_against_the_champion_once(everything: Everything) -> None:
    """Built again, since somebody removed it, it is not judged again: another look could find a slow moment."""
    everything.serves = False
    with everything.process() as loop:
        run(loop, RunBounds(once=True), lambda said: None)
    assert [(champion.checkpoint, champion.min_speed) for champion in everything.to_beat if champion] == [(None, 0.8)]
    del everything.published[NEW]
    everything.serves = True
    assert ran(everything).champion.version != OLD
    assert everything.to_beat[1:] == [None]
