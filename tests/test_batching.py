"""How ragged batches are split."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from runtime.batching import COUNTS, FIXED_TOKENS, _cost, padded_length, split_by_length

LONGEST = 500
lengths = st.lists(st.integers(1, LONGEST), min_size=1, max_size=64)


@given(lengths, st.integers(16, 1024))
def test_every_sequence_runs_once_within_the_limits(sizes: list[int], max_tokens: int) -> None:
    parts = split_by_length(sizes, max_tokens, LONGEST)
    assert sorted(index for part in parts for index in part) == list(range(len(sizes)))
    for part in parts:
        longest = padded_length(max(sizes[index] for index in part), LONGEST)
        assert len(part) in COUNTS
        assert len(part) == 1 or len(part) * longest <= max_tokens


@given(lengths)
def test_the_split_is_never_dearer_than_one_by_one_or_halving(sizes: list[int]) -> None:
    def cost(parts: list[list[int]]) -> float:
        return sum(_cost(len(part), padded_length(max(sizes[i] for i in part), LONGEST)) for part in parts)

    order = sorted(range(len(sizes)), key=lambda index: -sizes[index])
    ours = cost(split_by_length(sizes, 10**6, LONGEST))
    for count in COUNTS:
        whole = [order[start : start + count] for start in range(0, len(order) - len(order) % count, count)]
        rest = [[index] for index in order[len(order) - len(order) % count :]]
        assert ours <= cost(whole + rest) + 1e-6


@given(st.integers(1, 10_000))
def test_padded_lengths_are_few_and_close(length: int) -> None:
    padded = padded_length(length, 10**6)
    assert length <= padded <= length * (1 + 1 / 16)
    assert padded_length(padded, 10**6) == padded
    assert padded_length(length, length) == length  # never past the position table
    assert padded == length or length > 32


def test_alike_sequences_share_a_batch_and_unlike_ones_do_not() -> None:
    assert split_by_length([10, 10, 10, 10], 512, LONGEST) == [[0, 1, 2, 3]]
    assert split_by_length([8, 200], 512, LONGEST) == [[1], [0]]
    assert FIXED_TOKENS > 0
