"""Federated rounds in parts: what joins updates, what refuses them, and when a round ends."""

from __future__ import annotations

import itertools
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.numpy import save_file

from builders.spec import LearnerSlice
from builders.spec.online import FederatedSlice
from online.federated import aggregate, checks
from online.federated.errors import UpdateRejected
from online.federated.keeping import RoundFiles, RoundsState
from online.federated.rounds import RoundPhase, Rounds, UpdateAnswer
from online.federated.tensors import shapes_of
from online.loop.settings import plan_of
from runtime.errors import InputError
from tests.online.federated_world import FIRST, by_hand, plan

CLIENTS = ("a", "b", "c", "d")


def test_a_mean_by_samples_is_what_it_says() -> None:
    random = np.random.default_rng(0)
    updates = {client: {"w": random.normal(size=(3, 2)).astype(np.float32)} for client in CLIENTS}
    share = aggregate.shares({"a": 1, "b": 2, "c": 3, "d": 4}, 1.0)
    found = aggregate.weighted_mean(updates, share)["w"]
    for place in np.ndindex(3, 2):
        by_hand = (1 * updates["a"]["w"][place] + 2 * updates["b"]["w"][place] + 3 * updates["c"]["w"][place]
                   + 4 * updates["d"]["w"][place]) / 10  # fmt: skip
        assert found[place] == pytest.approx(by_hand, rel=1e-5)


@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=12), st.floats(0, 1))
def test_no_client_outweighs_the_bound(samples: list[int], above: float) -> None:
    counted = {f"c{number}": count for number, count in enumerate(samples)}
    most = 1 / len(counted) + above * (1 - 1 / len(counted))
    found = aggregate.shares(counted, most)
    assert sum(found.values()) == pytest.approx(1)
    assert max(found.values()) <= most * (1 + 1e-9)
    free = [client for client in counted if found[client] < most * (1 - 1e-9)]
    for one, other in itertools.pairwise(free):  # the rest share by samples
        assert found[one] * counted[other] == pytest.approx(found[other] * counted[one])


def test_a_trimmed_mean_leaves_both_ends_out() -> None:
    values = {"a": 3.0, "b": -1e30, "c": 1.0, "d": 2.0, "e": 1e30}
    updates = {client: {"w": np.full(2, value, np.float32)} for client, value in values.items()}
    assert aggregate.trimmed_mean(updates, 0.2)["w"].tolist() == [2.0, 2.0]


def test_momentum_of_rounds_is_nesterovs() -> None:
    weights, momentum, velocity, expected = {"w": np.zeros(1, np.float32)}, None, 0.0, 0.0
    for step in (1.0, -0.5, 0.25):
        weights, momentum = aggregate.outer_step(weights, {"w": np.full(1, step, np.float32)}, momentum, 0.7, 0.9)
        velocity = 0.9 * velocity + step
        expected += 0.7 * (step + 0.9 * velocity)
        assert weights["w"][0] == pytest.approx(expected)
    plain, none = aggregate.outer_step(weights, {"w": np.full(1, 2.0, np.float32)}, None, 1.0, 0.0)
    assert none is None
    assert plain["w"][0] == pytest.approx(expected + 2)


_BETAS = (0.9, 0.95)


def _moments(gradients: np.ndarray, first: float, squares: float) -> dict[str, np.ndarray]:
    """Adam's, after steps along gradients [steps, weights]."""
    mean, square = np.full(gradients.shape[1], first), np.full(gradients.shape[1], squares)
    for gradient in gradients:
        mean = _BETAS[0] * mean + (1 - _BETAS[0]) * gradient
        square = _BETAS[1] * square + (1 - _BETAS[1]) * gradient**2
    return {"moments/0/0/exp_avg": mean.astype(np.float32), "moments/0/0/exp_avg_sq": square.astype(np.float32)}


@pytest.mark.parametrize("steps", [1, 5])
def test_pooled_moments_are_those_of_one_training_on_all_rows(steps: int) -> None:
    """Its gradient is the mean of the clients': over many weights of like gradients, its squares are found again."""
    random = np.random.default_rng(0)
    own = random.normal(0.3, 1.0, (4, steps, 40_000))  # [clients, steps, weights]
    share = {"a": 0.4, "b": 0.3, "c": 0.2, "d": 0.1}
    before = _moments(own[0, :0], 0.1, 0.5)
    ended = {client: _moments(own[place], 0.1, 0.5) for place, client in enumerate(CLIENTS)}
    mean = aggregate.weighted_mean(ended, share)
    found = aggregate.pooled_moments(before, mean, share, steps, _BETAS)
    one = _moments(np.tensordot(list(share.values()), own, 1), 0.1, 0.5)
    np.testing.assert_allclose(found["moments/0/0/exp_avg"], one["moments/0/0/exp_avg"], rtol=1e-3, atol=1e-5)
    pooled, plain, expected = (float(one["moments/0/0/exp_avg_sq"].mean()) for one in (found, mean, one))
    assert pooled == pytest.approx(expected, rel=0.06)
    assert abs(plain - expected) > 3 * abs(pooled - expected)


def test_pooled_moments_of_clients_that_agree_or_lie_stay_means() -> None:
    gradients = np.random.default_rng(1).normal(size=(1, 50))
    before, ended = _moments(gradients[:0], 0.1, 0.5), _moments(gradients, 0.1, 0.5)
    found = aggregate.pooled_moments(before, ended, {"a": 0.5, "b": 0.5}, 1, _BETAS)
    for name in ended:
        np.testing.assert_allclose(found[name], ended[name], rtol=1e-4, atol=1e-6)
    lie = {name: np.zeros_like(value) for name, value in ended.items()}  # squares below what they were must not be so
    found = aggregate.pooled_moments(before, lie, {"a": 0.5, "b": 0.5}, 1, _BETAS)
    assert (found["moments/0/0/exp_avg_sq"] >= 0).all()


SOUND = {"w": np.ones((2, 3), np.float32), "b": np.zeros(3, np.float32)}


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({**SOUND, "b": np.array([0, np.nan, 0], np.float32)}, "b holds NaN"),
        ({**SOUND, "b": np.array([0, np.inf, 0], np.float32)}, "b holds NaN or infinity"),
        ({**SOUND, "w": np.ones((3, 2), np.float32)}, r"w is F32 \[3, 2\], expected F32 \[2, 3\]"),
        ({**SOUND, "w": np.ones((2, 3), np.float64)}, r"w is F64 \[2, 3\], expected F32"),
        ({"w": SOUND["w"]}, "b is not there"),
        ({**SOUND, "more": np.zeros(1, np.float32)}, r"more is F32 \[1\], expected not there"),
        ({**SOUND, "w": 1e6 * SOUND["w"]}, "its length is .*; at most 10"),
        ({**SOUND, "w": 3e38 * SOUND["w"]}, "its length is"),
    ],
)
def test_an_update_that_must_not_count_says_why(tmp_path: Path, tensors: dict[str, np.ndarray], says: str) -> None:
    file = tmp_path / "update"
    save_file(SOUND, file)
    assert checks.require_update(file, shapes_of(SOUND), 10) == pytest.approx(6**0.5)
    save_file(tensors, file)
    with pytest.raises(UpdateRejected, match=says):
        checks.require_update(file, shapes_of(SOUND), 10)


@pytest.mark.parametrize(
    ("moments", "says"),
    [
        ({"exp_avg": 1.0}, "exp_avg are 2 long; at most 1"),
        ({"exp_avg_sq": 1.0}, "exp_avg_sq are 2 long; at most 1"),
        ({"exp_avg_sq": -0.01}, "holds a square below 0"),
        ({"exp_avg": np.nan}, "NaN"),
    ],
)
def test_moments_longer_than_gradients_can_be_are_refused(tmp_path: Path, moments: dict[str, float], says: str) -> None:
    file = tmp_path / "update"
    sound = {**SOUND, **{f"moments/0/0/{key}": np.full(4, 0.1, np.float32) for key in ("exp_avg", "exp_avg_sq")}}
    save_file(sound, file)
    assert checks.require_update(file, shapes_of(sound), 10, 1.0) == pytest.approx(6**0.5)  # of weights alone
    save_file(
        {**sound, **{f"moments/0/0/{key}": np.full(4, value, np.float32) for key, value in moments.items()}}, file
    )
    with pytest.raises(UpdateRejected, match=says):
        checks.require_update(file, shapes_of(sound), 10, 1.0)


def test_pickles_and_torn_files_are_no_updates(tmp_path: Path) -> None:
    save_file(SOUND, tmp_path / "sound")
    content = (tmp_path / "sound").read_bytes()
    for bytes_of_it in (pickle.dumps(SOUND), content[:-1], content + b"0", b"", b"\xff" * 64):
        (tmp_path / "update").write_bytes(bytes_of_it)
        with pytest.raises(UpdateRejected, match="no safetensors"):
            checks.require_update(tmp_path / "update", shapes_of(SOUND), 10)


def test_false_counts_are_refused() -> None:
    for said, joined in ((11, 10), (0, 0), (-1, -1), (101, 101)):
        with pytest.raises(UpdateRejected, match=f"counts {said} samples"):
            checks.require_count(said, joined, 100)
    checks.require_count(10, 10, 100)


def test_outliers_are_told_by_the_median() -> None:
    assert checks.outliers({"a": 1.0, "b": 100.0}, 5) == {}  # of two, which one?
    assert list(checks.outliers({"a": 1.0, "b": 1.2, "c": 100.0}, 5)) == ["c"]


# The state machine, against what each round may and must do.

events = st.one_of(
    st.tuples(st.just("seen"), st.sampled_from(CLIENTS)),
    st.tuples(st.just("take"), st.sampled_from(CLIENTS)),
    st.tuples(st.sampled_from(("sound", "poison", "stale")), st.sampled_from(CLIENTS)),
    st.tuples(st.just("wait"), st.sampled_from((1.0, 9.0, 31.0))),
    st.tuples(st.just("join"), st.sampled_from(CLIENTS)),  # the updates; an outlier is of this client
)


@settings(max_examples=80)
@given(st.lists(events, max_size=80), st.integers(1, 3), st.sampled_from((None, 4)))
def test_rounds_end_by_their_deadline_and_count_each_client_once(
    lived: list[tuple[str, object]], least: int, wanted: int | None
) -> None:
    of = plan(min_clients=least, clients=wanted, gather_s=9, deadline_s=30, attempts=2, max_share=1, rounds=3)
    now, rounds = 0.0, Rounds(of, 0, 0.0)
    counted: set[str] = set()
    for what, which in lived:
        before = rounds.number, rounds.attempt, rounds.phase
        if what == "wait":
            now += float(str(which))
        elif what == "seen":
            rounds.seen(str(which), now)
        elif what == "take":
            assert rounds.take(str(which), now) == (before[2] is RoundPhase.OPEN and which not in counted)
        elif what == "join":
            if rounds.phase is RoundPhase.COMPLETE:
                assert counted >= rounds.accepted
                assert len(rounds.accepted) >= least
                sound = rounds.accepted - {str(which)}
                if which in rounds.accepted:
                    rounds.reject(str(which), "outlier")
                rounds.joined(now)
                assert rounds.number == before[0] + (len(sound) >= least)
                counted = set()
        else:
            attempt = rounds.attempt - (what == "stale")
            answer = rounds.answer(str(which), rounds.number, attempt, "NaN" if what == "poison" else None, now)
            if before[2] is not RoundPhase.OPEN or what == "stale":
                assert answer is UpdateAnswer.LATE
            elif which in counted:
                assert answer is UpdateAnswer.TWICE
            else:
                assert answer is (UpdateAnswer.REJECTED if what == "poison" else UpdateAnswer.ACCEPTED)
                counted.add(str(which))
        assert (rounds.number, rounds.attempt) >= before[:2]
        was, due = (rounds.phase, rounds.attempt), rounds.deadline
        rounds.tick(now)
        if rounds.phase is RoundPhase.OPEN:
            assert now < rounds.deadline, "a round that does not end"
            if was[0] is not RoundPhase.OPEN:
                assert len(rounds.expected) >= least
                counted = set()
        if rounds.phase is RoundPhase.COMPLETE:
            assert len(rounds.accepted) >= least, "fewer than the minimum"
            assert not rounds.missing or now >= due or was[0] is RoundPhase.COMPLETE
        if was[0] is RoundPhase.GATHERING and rounds.phase is RoundPhase.GATHERING:
            assert rounds.attempt <= of.attempts
        if rounds.attempt != was[1]:
            counted = set()
    # Whatever was lived: with sound clients that answer, all rounds end; with none, it stops in bounded time.
    for _ in range(of.rounds * of.attempts * 2 + 4):
        now += 31
        rounds.tick(now)
        if rounds.phase is RoundPhase.COMPLETE:
            rounds.joined(now)
    assert rounds.phase in (RoundPhase.STOPPED, RoundPhase.DONE)


def test_a_lost_client_is_waited_for_once() -> None:
    of = plan(min_clients=2, deadline_s=30)
    rounds = Rounds(of, 0, 0.0)
    for client in "abc":
        rounds.seen(client, 0)
    rounds.tick(0)
    assert rounds.phase is RoundPhase.OPEN
    for client in "ab":
        assert rounds.answer(client, 0, 1, None, 5) is UpdateAnswer.ACCEPTED
    rounds.tick(29)
    assert rounds.phase is RoundPhase.OPEN
    rounds.tick(30)
    assert (rounds.phase, rounds.missing) == (RoundPhase.COMPLETE, {"c"})
    rounds.joined(30)
    rounds.tick(30)
    assert (rounds.phase, rounds.expected) == (RoundPhase.OPEN, {"a", "b"})
    assert rounds.answer("c", 0, 1, None, 31) is UpdateAnswer.LATE  # a straggler; it is there again
    assert rounds.take("c", 31)
    for client in "abc":
        assert rounds.answer(client, 1, 1, None, 32) is UpdateAnswer.ACCEPTED
    rounds.tick(32)
    assert (rounds.phase, rounds.missing) == (RoundPhase.COMPLETE, set())


def test_files_of_rounds_are_whole_or_the_older_ones(tmp_path: Path) -> None:
    files = RoundFiles(tmp_path)
    state = files.open("key", FIRST)
    later = {name: value + 1 for name, value in FIRST.items()}
    # Killed after the weights, before the state that names them: the older ones stand.
    (tmp_path / "weights.000001.safetensors").write_bytes(b"half of it")
    assert files.open("key", later) == state
    after = files.save(state.model_copy(update={"complete": 1}), later, FIRST)
    assert files.open("key", FIRST) == after
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "momentum.000001.safetensors", "pushed", "rounds.json", "weights.000001.safetensors"
    ]  # fmt: skip
    with pytest.raises(InputError, match="another update"):
        files.open("other", FIRST)
    (tmp_path / "momentum.000001.safetensors").write_bytes(b"else")
    with pytest.raises(InputError, match="not what was written"):
        files.open("key", FIRST)
    (tmp_path / "rounds.json").write_text('{"key": 1}')
    with pytest.raises(InputError, match="federated rounds in"):
        files.open("key", FIRST)
    assert RoundsState(key="k").complete == 0


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"min_clients": 5, "clients": 3}, "must not fall"),
        ({"min_clients": 3, "max_share": 0.3}, "at least 0.3334"),
        ({"min_clients": 3, "max_share": 0.4, "trim": 0.2}, "at least 0.3334"),
        ({"gather_s": 601}, "gather_s"),
        ({"secure_aggregation": True}, "Extra inputs"),
    ],
)
def test_plans_that_make_no_sense_are_refused(given: dict[str, object], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        FederatedSlice.model_validate(given)


def test_what_rounds_would_not_honour_is_refused_by_name() -> None:
    found = plan_of(FederatedSlice(rounds=18), LearnerSlice(steps=90))
    assert (found.rounds, found.local_steps) == (18, 5)
    with pytest.raises(InputError, match=r"learner\.steps=90"):
        plan_of(FederatedSlice(rounds=20), LearnerSlice(steps=90))
    with pytest.raises(InputError, match="share_moments"):
        plan_of(FederatedSlice(), LearnerSlice(optimiser="sgd"))
    assert plan_of(FederatedSlice(share_moments=False), LearnerSlice(optimiser="sgd")).rounds == 30
    with pytest.raises(InputError, match=r"online\.learner\.kl"):
        plan_of(FederatedSlice(), LearnerSlice(kl=0.5))


def test_the_world_of_the_tests_moves() -> None:
    ended = by_hand(["amber", "birch"], plan(rounds=30))
    for value in ended.values():
        np.testing.assert_allclose(value, 1.5, atol=1e-2)  # halves of 1 and 2: no share is above a half
