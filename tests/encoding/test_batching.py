"""How ragged batches are split, and what gets all cores."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from runtime.encoding.batching import COUNTS, padded_length, plan, split_by_length
from runtime.encoding.cost import USUAL, CostModel, Costs, fitted, measure, shapes

LONGEST = 500
lengths = st.lists(st.integers(1, LONGEST), min_size=1, max_size=64)
# As two machines have it: all cores take a part in 0.6 of a core's time, small parts and large ones alike.
TWO_CORES = Costs(USUAL, 2, CostModel(USUAL.tokens, tuple(0.6 * ms for ms in USUAL.milliseconds)))


def cost_of(part: list[int], sizes: list[int], model: CostModel = USUAL) -> float:
    return model.of(len(part), padded_length(max(sizes[index] for index in part), LONGEST))


@given(lengths, st.integers(16, 1024))
def test_every_sequence_runs_once_within_the_limits(sizes: list[int], max_tokens: int) -> None:
    for costs in (Costs(USUAL), TWO_CORES, Costs(USUAL, 16)):
        planned = plan(sizes, max_tokens, LONGEST, costs)
        parts = [*planned.wide, *planned.narrow]
        assert sorted(index for part in parts for index in part) == list(range(len(sizes)))
        assert not planned.wide or costs.wide is not None
        for part in parts:
            longest = padded_length(max(sizes[index] for index in part), LONGEST)
            assert len(part) in COUNTS
            assert len(part) == 1 or len(part) * longest <= max_tokens


@given(lengths)
def test_the_split_is_never_dearer_than_one_by_one_or_halving(sizes: list[int]) -> None:
    order = sorted(range(len(sizes)), key=lambda index: -sizes[index])
    ours = sum(cost_of(part, sizes) for part in split_by_length(sizes, 10**6, LONGEST, USUAL))
    for count in COUNTS:
        whole = [order[start : start + count] for start in range(0, len(order) - len(order) % count, count)]
        rest = [[index] for index in order[len(order) - len(order) % count :]]
        assert ours <= sum(cost_of(part, sizes) for part in whole + rest) + 1e-6


@given(lengths)
def test_a_plan_for_two_cores_ends_no_later_than_without_the_second(sizes: list[int]) -> None:
    alone = plan(sizes, 512, LONGEST, Costs(USUAL))
    narrow = plan(sizes, 512, LONGEST, Costs(USUAL, 2))
    both = plan(sizes, 512, LONGEST, TWO_CORES)
    assert both.ms <= narrow.ms + 1e-6
    assert narrow.ms <= alone.ms + 1e-6
    assert TWO_CORES.wide is not None
    spent = sum(cost_of(part, sizes, TWO_CORES.wide) for part in both.wide)
    work = sum(cost_of(part, sizes) for part in both.narrow)
    assert both.ms >= spent + work / 2 - 1e-6  # no lane computes two parts at once
    assert not both.wide or not both.narrow


def test_a_part_that_is_alone_takes_the_idle_cores() -> None:
    assert plan([20], 512, LONGEST, TWO_CORES).wide == [[0]]
    assert plan([20], 512, LONGEST, Costs(USUAL, 2)).wide == []
    assert plan([200, 200], 200, LONGEST, TWO_CORES).narrow == [[0], [1]]  # both lanes have work
    assert plan([200, 200, 200], 200, LONGEST, TWO_CORES).wide == []
    four = Costs(USUAL, 4, CostModel(USUAL.tokens, tuple(0.25 * ms for ms in USUAL.milliseconds)))
    assert plan([200, 200, 200], 200, LONGEST, four).wide == [[0], [1], [2]]


def test_parts_stay_small_where_large_ones_outgrow_the_caches() -> None:
    """A CPU on which a token of a large part costs twice as much as one of a part of 128 tokens."""
    steep = CostModel((16, 128, 512), (2.0, 10.0, 80.0))
    flat = CostModel((16, 128, 512), (2.0, 10.0, 34.0))
    sizes = [16] * 32
    assert max(len(part) for part in split_by_length(sizes, 512, LONGEST, steep)) == 8
    assert max(len(part) for part in split_by_length(sizes, 512, LONGEST, flat)) == 32


def test_the_fit_gives_back_the_machine_that_was_measured() -> None:
    machine = CostModel((16, 32, 64, 128, 256, 512), (3.0, 4.0, 6.0, 10.0, 20.0, 60.0), 0.0005)
    wanted = shapes(512, 256)
    assert wanted == [(1, 16), (1, 32), (2, 32), (4, 32), (8, 32), (16, 32), (1, 256)]
    found = fitted({shape: machine.of(*shape) for shape in wanted})
    for count, length in ((1, 8), (3, 40), (16, 32), (1, 200), (7, 250)):
        assert abs(found.of(count, length) - machine.of(count, length)) < 0.02 * machine.of(count, length)


@given(st.dictionaries(st.sampled_from(shapes(512, 256)), st.floats(0.01, 1e4), min_size=1))
def test_whatever_noise_was_measured_more_work_costs_no_less(noisy: dict[tuple[int, int], float]) -> None:
    if all(length > 32 for _, length in noisy):
        noisy[1, 16] = 1.0
    found = fitted(noisy)
    for length in (8, 32, 200):
        costs = [found.of(count, length) for count in COUNTS]
        assert all(a <= b * (1 + 1e-9) for a, b in pairwise(costs))
        assert costs[0] > 0


def test_measuring_ends_in_time_and_has_a_point() -> None:
    ran = []
    found = measure(ran.append, shapes(512, 256), seconds=0.0)
    assert ran == [(1, 16)]
    assert found.of(4, 32) > found.of(1, 16) > 0


def test_short_models_are_measured_within_their_position_table() -> None:
    assert all(length <= 20 for _, length in shapes(512, 20))
    assert all(count * length <= 64 or count == 1 for count, length in shapes(64, 256))


@given(st.integers(1, 10_000))
def test_padded_lengths_are_few_and_close(length: int) -> None:
    padded = padded_length(length, 10**6)
    assert length <= padded <= length * (1 + 1 / 16)
    assert padded_length(padded, 10**6) == padded
    assert padded_length(length, length) == length  # never past the position table
    assert padded == length or length > 32


def test_alike_sequences_share_a_batch_and_unlike_ones_do_not() -> None:
    assert split_by_length([10, 10, 10, 10], 512, LONGEST, USUAL) == [[0, 1, 2, 3]]
    assert split_by_length([8, 200], 512, LONGEST, USUAL) == [[1], [0]]
