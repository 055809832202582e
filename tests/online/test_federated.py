"""Federated rounds over gRPC with mutual TLS: who is not sound does not count, who is gone is not waited for, and a
coordinator that is killed goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from online.federated import wire
from online.federated.client import PartTaken
from online.federated.coordinator import ClientRefused, Coordinator
from online.federated.errors import TooFewClients
from online.federated.keeping import RoundFiles
from online.federated.local import Learnt, Lesson
from online.federated.plan import FederatedPlan
from online.federated.rounds import UpdateAnswer
from online.federated.tensors import Floats, TensorFile, Tensors
from tests.online.federated_world import (
    FIRST,
    SAMPLES,
    Clock,
    Mover,
    by_hand,
    clients,
    hello,
    moved,
    offer,
    plan,
    require_same,
    running,
)

NAMES = tuple(SAMPLES)


@dataclass
class Told:
    """What a coordinator said."""

    lines: list[str] = field(default_factory=list)

    def __call__(self, said: str) -> None:
        self.lines.append(said)

    def about(self, word: str) -> list[str]:
        return [line for line in self.lines if word in line]


def test_rounds_come_to_what_a_direct_computation_comes_to(tmp_path: Path, certificates: Path) -> None:
    of = plan(clients=3, gather_s=30, outer_momentum=0.5, max_share=0.5)
    coordinator = Coordinator(offer(of), RoundFiles(tmp_path), FIRST)
    with running(coordinator, certificates) as (address, _, ended):
        threads, found = clients(address, certificates, [Mover(name) for name in NAMES[:3]])
        for thread in threads:
            thread.join(60)
    require_same(ended[0], by_hand(NAMES[:3], of))  # type: ignore[arg-type]
    assert found == {name: PartTaken(True, (1, 2, 3, 4), {}) for name in NAMES[:3]}
    history = coordinator.state.history
    assert [[one.client for one in record.accepted] for record in history] == [list(NAMES[:3])] * 4
    assert history[0].accepted[0].share == pytest.approx(0.5)  # 30 of 60 rows
    assert not list(coordinator.files.pushed.iterdir()), "an update was left behind"


@dataclass
class Poisoner(Mover):
    harm: Callable[[dict[str, Floats]], dict[str, Floats]] = lambda update: update
    loss: float = 1.0

    def learn(self, lesson: Lesson, weights: Tensors) -> Learnt:
        self.rounds.append(lesson.number)
        return Learnt(self.harm(moved(self.client, weights)), self.loss, None)


def _with_nan(update: dict[str, Floats]) -> dict[str, Floats]:
    return {**update, "b": np.full(5, np.nan, np.float32)}


def _of_another_shape(update: dict[str, Floats]) -> dict[str, Floats]:
    return {**update, "a": update["a"].T.copy()}


def _huge(update: dict[str, Floats]) -> dict[str, Floats]:
    return {name: (1e4 * value).astype(np.float32) for name, value in update.items()}


def _large(update: dict[str, Floats]) -> dict[str, Floats]:
    """Within the bound, and far from what the others bring."""
    return {name: (6 * np.sign(value) * np.ones_like(value)).astype(np.float32) for name, value in update.items()}


def _endless(update: dict[str, Floats]) -> dict[str, Floats]:
    return {**update, "more": np.zeros(1 << 19, np.float32)}


@pytest.mark.parametrize(
    ("harm", "says"),
    [(_with_nan, "b holds NaN"), (_of_another_shape, r"a is F32 \[4, 3\]"), (_huge, "its length is"),
     (_large, "the round's median"), (_endless, "more than")],
)  # fmt: skip
def test_a_poisoned_client_is_named_and_the_rounds_go_on_without_it(
    tmp_path: Path, certificates: Path, harm: Callable[[dict[str, Floats]], dict[str, Floats]], says: str
) -> None:
    of, told = plan(clients=4, gather_s=30, min_clients=3, rounds=1, outlier=2.5), Told()
    coordinator = Coordinator(offer(of), RoundFiles(tmp_path), FIRST, told)
    sound = [Mover(name) for name in NAMES[:3]]
    with running(coordinator, certificates) as (address, _, ended):
        threads, found = clients(address, certificates, [*sound, Poisoner(NAMES[3], harm=harm)])
        for thread in threads:
            thread.join(60)
    require_same(ended[0], by_hand(NAMES[:3], of))  # type: ignore[arg-type]
    (record,) = coordinator.state.history
    assert list(record.rejected) == [NAMES[3]]
    with pytest.raises(AssertionError, match=says):
        raise AssertionError(record.rejected[NAMES[3]])
    assert len(told.about(f"the update of {NAMES[3]} is rejected")) == 1
    part = found[NAMES[3]]
    assert isinstance(part, PartTaken)
    assert part.done


def joined(coordinator: Coordinator, names: Sequence[str]) -> dict[str, str]:
    return {name: coordinator.join(name, hello(name)).session for name in names}


def pushed(session: str, samples: int, task: wire.Task, **given: object) -> wire.Pushed:
    return wire.Pushed.model_validate(
        {"session": session, "number": task.number, "attempt": task.attempt, "samples": samples, "loss": 1.0, **given}
    )


def bytes_of(update: dict[str, Floats]) -> list[bytes]:
    from safetensors.numpy import save

    return [save(update)]


def one_pushes(coordinator: Coordinator, name: str, session: str, **given: object) -> wire.PushTaken:
    task, _ = coordinator.pull(name, wire.Ask(session=session), 5)
    assert task.kind == "round"
    said = pushed(session, int(str(given.pop("samples", SAMPLES[name]))), task, **given)
    return coordinator.push(name, said, bytes_of(moved(name, FIRST)))


def test_a_false_count_does_not_count(tmp_path: Path) -> None:
    """Nor does a loss that is none, an update that failed, or a second one."""
    coordinator = Coordinator(offer(plan(min_clients=2, rounds=1)), RoundFiles(tmp_path), FIRST)
    sessions = joined(coordinator, NAMES)
    coordinator.tick()
    found = one_pushes(coordinator, "amber", sessions["amber"], samples=10**6)
    assert (found.answer, found.why) == (UpdateAnswer.REJECTED, "it counts 1000000 samples; the client joined with 30")
    assert "loss is None" in one_pushes(coordinator, "birch", sessions["birch"], loss=None).why
    assert "diverged" in one_pushes(coordinator, "cedar", sessions["cedar"], failed="diverged at step 2").why
    assert one_pushes(coordinator, "delta", sessions["delta"]).answer is UpdateAnswer.ACCEPTED
    again = coordinator.push("delta", pushed(sessions["delta"], 25, wire.Task(kind="round", attempt=1)), [])
    assert again.answer in (UpdateAnswer.TWICE, UpdateAnswer.REJECTED)
    assert coordinator.rounds.accepted == {"delta"}
    with pytest.raises(ClientRefused, match="from 1 to 1000000"):
        coordinator.join("amber", hello("amber", samples=10**9))


@pytest.mark.parametrize(
    ("given", "says"),
    [({"architecture": "other"}, "another configuration"), ({"window": 8}, "window is 8 there, 16 here"),
     ({"protocol": 2}, "protocol 2"), ({"samples": 0}, "0 samples")],
)  # fmt: skip
def test_a_client_that_does_not_fit_is_told_why(tmp_path: Path, given: dict[str, object], says: str) -> None:
    coordinator = Coordinator(offer(plan(most_clients=2)), RoundFiles(tmp_path), FIRST)
    with pytest.raises(ClientRefused, match=says):
        coordinator.join("amber", hello("amber", **given))
    joined(coordinator, NAMES[:2])
    with pytest.raises(ClientRefused, match="no more may"):
        coordinator.join("cedar", hello("cedar"))


def test_a_second_process_with_a_certificate_takes_the_firsts_place(tmp_path: Path) -> None:
    coordinator = Coordinator(offer(plan(min_clients=1, max_share=1)), RoundFiles(tmp_path), FIRST)
    first = joined(coordinator, ["amber"])["amber"]
    second = joined(coordinator, ["amber"])["amber"]
    coordinator.tick()
    with pytest.raises(ClientRefused, match="another process has joined as amber"):
        coordinator.pull("amber", wire.Ask(session=first), 0)
    assert coordinator.pull("amber", wire.Ask(session=second), 0)[0].kind == "round"
    with pytest.raises(ClientRefused, match="birch has not joined"):
        coordinator.pull("birch", wire.Ask(session=second), 0)


def test_a_straggler_and_a_lost_client_end_no_round(tmp_path: Path) -> None:
    clock, told = Clock(), Told()
    of = plan(rounds=1, min_clients=2)
    coordinator = Coordinator(offer(of), RoundFiles(tmp_path), FIRST, told, clock, farewell_s=0)
    sessions = joined(coordinator, NAMES[:4])
    coordinator.tick()
    tasks = {name: coordinator.pull(name, wire.Ask(session=sessions[name]), 0)[0] for name in NAMES[:3]}
    for name in NAMES[:2]:
        coordinator.push(name, pushed(sessions[name], SAMPLES[name], tasks[name]), bytes_of(moved(name, FIRST)))
    clock.now = of.deadline_s
    require_same(coordinator.run(), by_hand(NAMES[:2], of))
    late = coordinator.push("cedar", pushed(sessions["cedar"], 20, tasks["cedar"]), bytes_of(moved("cedar", FIRST)))
    assert late.answer is UpdateAnswer.LATE
    assert coordinator.state.history[0].missing == ("cedar", "delta")
    assert told.about("missing delta")
    assert not list(coordinator.files.pushed.iterdir())


def test_below_the_minimum_nothing_is_joined(tmp_path: Path) -> None:
    """The weights stay what they were, and the same coordinator, later, goes on."""
    clock, told = Clock(), Told()
    of = plan(rounds=2, min_clients=2, attempts=2)
    coordinator = Coordinator(offer(of), RoundFiles(tmp_path), FIRST, told, clock)
    sessions = joined(coordinator, NAMES[:3])
    for _ in range(of.attempts):
        joined(coordinator, NAMES[1:3])  # they are heard of, and no more
        coordinator.rounds.seen("amber", clock())
        coordinator.tick()
        assert one_pushes(coordinator, "amber", sessions["amber"]).answer is UpdateAnswer.ACCEPTED
        clock.now += of.deadline_s
        coordinator.tick()
    with pytest.raises(TooFewClients, match=r"min_clients=2 .* 0 rounds are complete"):
        coordinator.run()
    assert len(told.about("too few answered")) == 2
    assert told.about("nothing came from birch, cedar")
    again = Coordinator(
        offer(of), RoundFiles(tmp_path), {name: value * 0 for name, value in FIRST.items()}, told, clock
    )
    assert again.state.complete == 0
    require_same(TensorFile(again.files.weights_file(again.state)), FIRST)


def test_a_client_that_dies_gets_its_round_again(tmp_path: Path) -> None:
    coordinator = Coordinator(offer(plan(min_clients=1, max_share=1)), RoundFiles(tmp_path), FIRST)
    for _ in range(2):
        session = joined(coordinator, ["amber"])["amber"]
        coordinator.tick()
        task, file = coordinator.pull("amber", wire.Ask(session=session), 0)
        assert (task.kind, task.number, file is not None) == ("round", 0, True)
    with pytest.raises(RuntimeError, match="cut off"):
        coordinator.push("amber", pushed(session, 30, task), _cut_off())
    assert coordinator.rounds.missing == {"amber"}
    assert not list(coordinator.files.pushed.iterdir())
    assert one_pushes(coordinator, "amber", session).answer is UpdateAnswer.ACCEPTED


def _cut_off() -> Iterator[bytes]:
    yield bytes_of(moved("amber", FIRST))[0][:10]
    raise RuntimeError("the connection was cut off")


def test_a_plan_says_all_of_what_the_spec_says() -> None:
    from builders.spec.online import FederatedSlice

    assert set(FederatedPlan.model_fields) == {*FederatedSlice.model_fields, "local_steps"}
    defaults = FederatedSlice().model_dump()
    assert {name: getattr(FederatedPlan(), name) for name in defaults} == defaults
