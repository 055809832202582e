"""Which sequences of mixed length run together. Pure arithmetic.

Padding dominates the cost of a naive batch of mixed lengths, and many small batches pay a fixed cost each. The split
here is the cheapest under a cost model, among batches of few distinct shapes: executors make kernels for a shape when
they first see it, so shapes must come back.
"""

from __future__ import annotations

from collections.abc import Sequence

# Cost of a batch beside its tokens, in tokens. MiniLM on one core: about 3 ms when the shape differs from the last
# one's, against 0.09 ms a token.
FIXED_TOKENS = 48
# At this length attention over the sequence costs as much as the rest of a token (MiniLM: about 2000).
QUADRATIC_LENGTH = 2000
COUNTS = (1, 2, 4, 8, 16, 32, 64)


def padded_length(length: int, longest: int) -> int:
    """The next length with five significant bits, at most `longest`, which the model's position table ends with.

    At most 1/16 of it is padding, and lengths up to 32 are exact.
    """
    step = 1 << max(0, length.bit_length() - 5)
    return max(length, min(-(-length // step) * step, longest))


def split_by_length(lengths: Sequence[int], max_tokens: int, longest: int) -> list[list[int]]:
    """Indices into `lengths`, cut into parts, the longest sequences first.

    A part holds a number of sequences from COUNTS, padded to `padded_length` of its longest, and at most `max_tokens`
    with padding unless it is a single sequence. Of all such cuts of the sorted sequences this is the cheapest one, by
    dynamic programming over the prefixes.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    best = [0.0]
    taken = [0]
    for end in range(1, len(order) + 1):
        choices = []
        for count in COUNTS:
            if count > end:
                break
            padded = padded_length(max(lengths[order[end - count]], 1), longest)
            if count == 1 or count * padded <= max_tokens:
                choices.append((best[end - count] + _cost(count, padded), count))
        cost, count = min(choices)
        best.append(cost)
        taken.append(count)
    parts = []
    end = len(order)
    while end:
        parts.append(order[end - taken[end] : end])
        end -= taken[end]
    return parts[::-1]


def _cost(count: int, length: int) -> float:
    return FIXED_TOKENS + count * length * (1 + length / QUADRATIC_LENGTH)
