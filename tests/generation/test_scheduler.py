"""Scheduler and cache under random traffic, over memory that remembers which tokens it holds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from runtime.errors import TooLate, Unavailable
from runtime.generation.engine import GenerationEngine, generate
from runtime.generation.grouping import choose_pools, pool_for, regroup
from runtime.generation.request import SamplingParams, Update
from tests.generation.ledger import VOCABULARY, Ledger, continuation
from tests.generation.setup import engine_over

START = 1  # of outputs, where an encoder reads the prompts
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
        slots=st.sampled_from([3, 24]),  # few, and more than a chunk has tokens
        encoder=st.booleans(),
    )
    def start(
        self, capacities: tuple[int, ...], kept: int, chunk: int, cost: int, stages: int, slots: int, encoder: bool
    ) -> None:
        self.now, self.encoder = 0.0, encoder
        self.ledger = Ledger(capacities, slots + kept, stages, encoder=encoder)
        engine = engine_over(
            self.ledger, capacities, slots, kept=kept, chunk=chunk, queue=slots + 1, call_cost=cost,
            start=START if encoder else None,
        )  # fmt: skip
        self.engine = GenerationEngine(engine.executor, engine.scheduler, engine.limits, clock=lambda: self.now)
        self.prompts: dict[int, list[int]] = {}
        self.room: dict[int, int] = {}
        self.outputs: dict[int, list[int]] = {}
        self.ended: dict[int, Update] = {}

    @rule(prompt=PROMPTS, count=st.integers(1, 12), timeout=st.none() | st.integers(1, 30))
    def submit(self, prompt: list[int], count: int, timeout: int | None) -> None:
        params = SamplingParams(max_tokens=count)
        number = self.engine.submit(np.array(prompt, np.int64), params, timeout_s=timeout)
        self.prompts[number], self.room[number], self.outputs[number] = prompt, count, []

    @rule(prompts=st.lists(PROMPTS, min_size=15, max_size=30), count=st.integers(1, 12))
    def rush(self, prompts: list[list[int]], count: int) -> None:
        for prompt in prompts:
            self.submit(prompt, count, None)

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
        self.engine.scheduler.check_integrity()
        assert not self.ledger.misused
        for number, tokens in self.outputs.items():
            prompt = self.prompts[number]
            alone = ([START], len(tokens), prompt) if self.encoder else (prompt, len(tokens))
            assert tokens == continuation(*alone)
            end = self.ended.get(number)
            if end is not None and end.finish == "length":
                assert len(tokens) == self.room[number]
            if end is not None and end.finish == "error":
                assert isinstance(end.error, (Unavailable, TooLate))

    def teardown(self) -> None:
        """Nobody starves: when nothing more comes, all that is left ends, within the steps that its work takes."""
        work = sum(len(prompt) + self.room[number] for number, prompt in self.prompts.items())
        for _ in range(2 * work + 10):
            self.step(1)
        assert set(self.ended) == set(self.prompts)
        assert not self.engine.step()
        assert self.engine.gauges().running == 0
        assert self.engine.scheduler.cache.running == 0


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)


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
    engine.scheduler.check_integrity()


@pytest.mark.parametrize(("slots", "chunk"), [(64, 16), (192, 128)])
def test_every_row_keeps_its_source_where_prompts_wait_for_their_turn(slots: int, chunk: int) -> None:
    """More rows than tokens in a step: some are moved before their first token."""
    random = np.random.default_rng(0)
    sources = [random.integers(0, VOCABULARY, size) for size in random.integers(1, 60, 400)]
    engine = engine_over(
        Ledger((16, 32, 64), slots + 2, encoder=True), (16, 32, 64), slots, chunk=chunk, queue=400, start=START
    )
    numbers = [engine.submit(s, SamplingParams(max_tokens=int(random.integers(1, 40)))) for s in sources]
    outputs: dict[int, list[int]] = {number: [] for number in numbers}
    while engine.step():
        engine.scheduler.check_integrity()
        for update in engine.take_updates():
            outputs[update.request] += update.tokens
    alone = [continuation([START], len(outputs[n]), s.tolist()) for n, s in zip(numbers, sources, strict=True)]
    assert list(outputs.values()) == alone
    assert engine.gauges().kept == 0  # nothing is shared, so nothing is kept


def test_what_an_earlier_tenant_left_is_gone_before_a_row_that_moved_is_computed() -> None:
    """Also where no source is: masked or not, a NaN behind a row's tokens would spoil it."""
    engine = engine_over(Ledger((64,), 66), (64,), 64, chunk=16, queue=400)
    prompts = [np.full(1 + number % 7, number % VOCABULARY) for number in range(300)]
    outputs = generate(engine, prompts, SamplingParams(max_tokens=9))
    assert outputs == [continuation(prompt.tolist(), 9) for prompt in prompts]


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


def test_prompts_of_another_salt_are_computed_anew() -> None:
    """Kept rows and running ones: else the time to a first token tells who else has asked the same."""
    ledger = Ledger((64,), 6)
    engine = engine_over(ledger, (64,), 3, kept=3)
    for salt, computed in (("ann", 20), ("bob", 20), ("", 20), ("ann", 1), ("bob", 1), ("", 1)):
        ledger.steps.clear()
        generate(engine, [np.arange(20)], SamplingParams(max_tokens=1, cache_salt=salt))
        assert sum(ledger.steps) == computed, salt
    reused = engine.counters.reused_tokens
    for salt in ("ann", "bob"):
        engine.submit(np.arange(30, 45), SamplingParams(max_tokens=10, cache_salt=salt))
        engine.step()
    assert engine.counters.reused_tokens == reused


def test_a_full_queue_refuses_and_a_late_request_is_told_so() -> None:
    now = [0.0]
    base = engine_over(Ledger((32,), 2), (32,), 1, kept=1, queue=2)
    engine = GenerationEngine(base.executor, base.scheduler, base.limits, clock=lambda: now[0])
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
    assert isinstance(late[0].error, TooLate)


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
