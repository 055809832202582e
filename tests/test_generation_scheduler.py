"""Scheduler and cache under random traffic, over memory that remembers which tokens it holds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from numpy.typing import NDArray

from runtime.errors import ServerFault, Unavailable
from runtime.generation.engine import Engine, generate
from runtime.generation.executor import Batch, Copy, Logits, Row, Tokens
from runtime.generation.grouping import choose_pools, pool_for, regroup
from runtime.generation.request import SamplingParams, Update
from tests.generation_setup import engine_over

VOCABULARY = 50


class Ledger:
    """An executor whose cache holds the tokens themselves, and whose logits depend on all of a row's tokens.

    It fails where a real one would go wrong in silence: a position written twice or left out, a row outside its pool.
    """

    vocabulary, stages, call_cost = VOCABULARY, 1, 10

    def __init__(self, capacities: Sequence[int], rows: int, stages: int = 1) -> None:
        self._capacities, self._rows, self.stages = capacities, rows, stages
        self.steps: list[int] = []  # tokens of each step
        self.broken = False
        self.reset()

    def reset(self) -> None:
        self._cells = [np.full((self._rows, capacity), -1, np.int64) for capacity in self._capacities]

    def run(self, batches: Sequence[Batch]) -> list[Logits]:
        if self.broken:
            self.broken = False
            raise ServerFault("pulled the plug")
        self.steps.append(sum(batch.input_ids.size for batch in batches))
        touched = [(batch.pool, row) for batch in batches for row in batch.rows]
        assert len(touched) == len(set(touched)), "two batches of one step share a row"
        return [self._run(batch) for batch in batches]

    def _run(self, batch: Batch) -> Logits:
        cells, length = self._cells[batch.pool], batch.input_ids.shape[1]
        assert length == 1 or (length > 1 and len(batch.input_ids) == 1)
        logits = np.zeros((len(batch.input_ids), VOCABULARY), np.float32)
        for index, (row, start) in enumerate(zip(batch.rows, batch.write_indices, strict=True)):
            assert start + length <= cells.shape[1], "written past the capacity"
            cells[row, start : start + length] = batch.input_ids[index]
            held = cells[row, : start + length]
            assert (held >= 0).all(), "a position was never written"
            logits[index, follower(held)] = 1.0
        return logits

    def copy(self, copies: Sequence[Copy]) -> None:
        for source, target, tokens in copies:
            cells = self._cells[target.pool][target.place]
            if source is not None:
                cells[:tokens] = self._cells[source.pool][source.place][:tokens]
            cells[tokens:] = -1

    def encode(self, row: Row, source: Tokens) -> None:
        raise AssertionError("no encoder")

    def close(self) -> None: ...


def follower(tokens: NDArray[np.int64]) -> int:
    return int((tokens * np.arange(1, len(tokens) + 1)).sum() * 7 + len(tokens)) % VOCABULARY


def continuation(prompt: Sequence[int], count: int) -> list[int]:
    """What one request alone must give."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(follower(np.array(tokens)))
    return tokens[len(prompt) :]


SLOTS, QUEUE = 3, 4
# Few distinct tokens, so that prompts share beginnings.
PROMPTS = st.lists(st.integers(0, 1), min_size=1, max_size=20)


class Traffic(RuleBasedStateMachine):
    """Requests come, go on, are cancelled and time out in any order; the executor dies now and then."""

    @initialize(
        capacities=st.sampled_from([(32,), (8, 32), (4, 8, 16, 32)]),
        kept=st.integers(1, 2),
        chunk=st.integers(1, 12),
        cost=st.integers(0, 40),
        stages=st.integers(1, 2),
    )
    def start(self, capacities: tuple[int, ...], kept: int, chunk: int, cost: int, stages: int) -> None:
        self.now = 0.0
        self.ledger = Ledger(capacities, SLOTS + kept, stages)
        engine = engine_over(self.ledger, capacities, SLOTS, kept=kept, chunk=chunk, queue=QUEUE, call_cost=cost)
        self.engine = Engine(engine.executor, engine.scheduler, engine.limits, clock=lambda: self.now)
        self.prompts: dict[int, list[int]] = {}
        self.room: dict[int, int] = {}
        self.outputs: dict[int, list[int]] = {}
        self.ended: dict[int, Update] = {}
        self.lost: set[int] = set()

    @rule(prompt=PROMPTS, count=st.integers(1, 12), timeout=st.none() | st.integers(1, 30))
    def submit(self, prompt: list[int], count: int, timeout: int | None) -> None:
        params = SamplingParams(max_tokens=count)
        number = self.engine.submit(np.array(prompt, np.int64), params, timeout_s=timeout)
        self.prompts[number], self.room[number], self.outputs[number] = prompt, count, []

    @rule(which=st.integers(0, 1000))
    def cancel(self, which: int) -> None:
        open_requests = sorted(set(self.prompts) - set(self.ended))
        if open_requests:
            self.engine.cancel(open_requests[which % len(open_requests)])

    @rule(count=st.integers(1, 4))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.now += 1.0
            self.engine.step()
            self._collect()

    @precondition(lambda self: self.engine.scheduler.running)
    @rule()
    def fail(self) -> None:
        self.ledger.broken = True
        self.lost |= set(self.engine.scheduler.running)

    def _collect(self) -> None:
        for update in self.engine.take_updates():
            assert update.request not in self.ended, "an update after the last"
            self.outputs[update.request] += update.tokens
            if update.finish is not None:
                self.ended[update.request] = update

    @invariant()
    def sound(self) -> None:
        if not hasattr(self, "engine"):
            return
        self.engine.scheduler.cache.check_integrity()
        for number, tokens in self.outputs.items():
            assert tokens == continuation(self.prompts[number], len(tokens))
            end = self.ended.get(number)
            if end is not None and end.finish == "length":
                assert len(tokens) == self.room[number]
            if end is not None and end.finish == "error":
                assert isinstance(end.error, Unavailable)

    def teardown(self) -> None:
        """Nobody starves: when nothing more comes, all that is left ends, within the steps that its work takes."""
        work = sum(len(prompt) + self.room[number] for number, prompt in self.prompts.items())
        for _ in range(2 * work + 10):
            self.step(1)
        assert set(self.ended) == set(self.prompts)
        assert not self.engine.step()


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)


def test_a_long_prompt_does_not_stall_running_streams() -> None:
    ledger = Ledger((256,), 6)
    engine = engine_over(ledger, (256,), 4, chunk=16)
    streams = [engine.submit(np.array([1, 2]), SamplingParams(max_tokens=60)) for _ in range(2)]
    engine.step()
    engine.take_updates()
    engine.submit(np.ones(200, np.int64), SamplingParams(max_tokens=2))
    for _ in range(12):
        engine.step()
        assert {update.request for update in engine.take_updates()} >= set(streams)
    assert max(ledger.steps) <= 16 + 2


def test_a_short_prompt_overtakes_a_long_one_but_the_long_one_goes_on() -> None:
    engine = engine_over(Ledger((512,), 10), (512,), 8, chunk=16)
    long = engine.submit(np.ones(400, np.int64), SamplingParams(max_tokens=1))
    ended: list[int] = []
    for step in range(100):  # in every step a short prompt arrives that would take all of it
        engine.submit(np.full(16, step % 40), SamplingParams(max_tokens=1))
        engine.step()
        ended += [update.request for update in engine.take_updates()]
    assert long in ended
    assert ended.index(long) > 10


def test_rows_move_aside_where_none_is_free() -> None:
    engine = engine_over(Ledger((32,), 4), (32,), 3, kept=1, chunk=4)
    for first in range(10, 14):  # every row now keeps something
        generate(engine, [np.full(5, first)], SamplingParams(max_tokens=3))
    assert engine.gauges().kept == 4
    asked = [np.arange(20), np.array([30, 31, 32]), np.array([12, 12, 7])]  # the later ones are ready to decode first
    outputs = generate(engine, asked, SamplingParams(max_tokens=8))
    assert outputs == [continuation(prompt.tolist(), 8) for prompt in asked]
    engine.scheduler.cache.check_integrity()


def test_rows_that_moved_as_the_last_stream_ended_can_be_shared() -> None:
    engine = engine_over(Ledger((32,), 7), (32,), 5, chunk=64)
    asked = [np.full(3 + first, first) for first in range(5)]
    for order in (asked, asked[::-1], asked):  # all of them end in the same step, and then there is nothing to do
        outputs = generate(engine, order, SamplingParams(max_tokens=6))
        assert outputs == [continuation(prompt.tolist(), 6) for prompt in order]
    assert engine.counters.reused_tokens


def test_a_finished_prompt_is_not_computed_again() -> None:
    ledger = Ledger((64,), 4)
    engine = engine_over(ledger, (64,), 2)
    first = generate(engine, [np.arange(20)], SamplingParams(max_tokens=5))[0]
    ledger.steps.clear()
    chat = np.array([*range(20), *first, 7, 8])  # the next turn of a conversation
    generate(engine, [chat], SamplingParams(max_tokens=1))
    assert ledger.steps == [3]  # the last token of the first turn was never in the cache
    ledger.steps.clear()
    generate(engine, [np.array([*range(15), 40, 41])], SamplingParams(max_tokens=1))
    assert ledger.steps == [2]  # a copy of what is shared
    assert engine.counters.reused_tokens == 24 + 15


def test_a_full_queue_and_a_late_request_are_unavailable() -> None:
    now = [0.0]
    base = engine_over(Ledger((32,), 2), (32,), 1, kept=1, queue=2)
    engine = Engine(base.executor, base.scheduler, base.limits, clock=lambda: now[0])
    numbers = [
        engine.submit(np.array([1]), SamplingParams(max_tokens=20), timeout_s=timeout) for timeout in (5, 9, 9, 9)
    ]
    engine.step()
    said = {update.request: str(update.error) for update in engine.take_updates() if update.error}
    assert said == dict.fromkeys(numbers[2:], "2 requests wait already; try again later")
    now[0] = 6.0
    engine.step()
    late = [update for update in engine.take_updates() if update.error is not None]
    assert [update.request for update in late] == [numbers[0]]
    assert isinstance(late[0].error, Unavailable)


@pytest.mark.parametrize(
    ("lengths", "call_cost", "pools"),
    [
        ([100, 100], 2000, [0, 0]),
        ([100, 100, 900], 2000, [1, 1, 1]),  # 1792 empty positions are cheaper than the weights once more
        ([100, 100, 900], 1000, [0, 0, 1]),
        ([100] * 5 + [900], 2000, [0, 0, 0, 0, 0, 1]),
        ([], 5, []),
    ],
)
def test_rows_of_unlike_length_part_when_empty_positions_cost_more_than_a_call(
    lengths: list[int], call_cost: int, pools: list[int]
) -> None:
    assert choose_pools(lengths, (128, 1024), call_cost) == pools


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 64), max_size=6),
    capacities=st.sets(st.integers(1, 64), max_size=3).map(lambda found: sorted({*found, 64})),
    cost=st.integers(0, 200),
    data=st.data(),
)
def test_grouping_is_the_cheapest_and_holds_everything(
    lengths: list[int], capacities: list[int], cost: int, data: st.DataObject
) -> None:
    import itertools

    def total(pools: Sequence[int]) -> int:
        return cost * len(set(pools)) + sum(capacities[pool] for pool in pools)

    choices = [range(pool_for(length, capacities), len(capacities)) for length in lengths]
    assert total(choose_pools(lengths, capacities, cost)) == min(map(total, itertools.product(*choices)))
    current = [data.draw(st.integers(0, len(capacities) - 1)) for _ in lengths]
    for length, pool in zip(lengths, regroup(current, lengths, capacities, cost), strict=True):
        assert capacities[pool] >= length
