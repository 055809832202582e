"""Which sequences of mixed length run together, and where. Pure arithmetic over measured costs.

Padding dominates the cost of a naive batch of mixed lengths, and many small batches pay a fixed cost each. The split
here is the cheapest under a cost model, among batches of few distinct shapes: executors make kernels for a shape when
they first see it, so shapes must come back.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from runtime.encoding.cost import CostModel, Costs

COUNTS = (1, 2, 4, 8, 16, 32, 64)


def padded_length(length: int, longest: int) -> int:
    """The next length with five significant bits, at most `longest`, which the model's position table ends with.

    At most 1/16 of it is padding, and lengths up to 32 are exact.
    """
    step = 1 << max(0, length.bit_length() - 5)
    return max(length, min(-(-length // step) * step, longest))


@dataclass(frozen=True)
class BatchPlan:
    """Indices of the sequences of each part: of `wide` parts, one after the other on all cores, or of `narrow` ones,
    the dearest first, side by side on the lanes. `ms`: what that takes by the cost model."""

    wide: list[list[int]]
    narrow: list[list[int]]
    ms: float


def plan(lengths: Sequence[int], max_tokens: int, longest: int, costs: Costs) -> BatchPlan:
    """The plan that ends first: of the cheapest cut into parts of `max_tokens`, and of cuts that all lanes share."""
    total = sum(padded_length(max(length, 1), longest) for length in lengths)
    limits = {max_tokens, *(min(max_tokens, -(-total // (share * costs.lanes))) for share in (1, 2))}
    plans = [
        _placed(split_by_length(lengths, limit, longest, costs.lane), lengths, longest, costs)
        for limit in (sorted(limits, reverse=True) if costs.lanes > 1 else [max_tokens])
    ]
    return min(plans, key=lambda found: found.ms)


# A part on all cores is dearer under load than in the quiet moments in which parts are measured. MiniLM on two busy
# cores, four texts at a time: as one part on both cores 14 % fewer texts/s than as two parts side by side.
_PUSHED_ASIDE = 1.25


def _placed(parts: list[list[int]], lengths: Sequence[int], longest: int, costs: Costs) -> BatchPlan:
    """Parts that are fewer than the lanes may be better off with all cores, one after the other. Where every lane has
    work they are not: a part on all cores waits for each thread that the server or a client pushes aside."""

    def shape(part: list[int]) -> tuple[int, int]:
        return len(part), padded_length(max(1, *(lengths[index] for index in part)), longest)

    timed = sorted(((costs.lane.of(*shape(part)), part) for part in parts), key=lambda item: -item[0])
    ordered = [part for _, part in timed]
    narrow = BatchPlan([], ordered, _side_by_side([ms for ms, _ in timed], costs.lanes))
    if costs.wide is None or len(parts) >= costs.lanes:
        return narrow
    wide = BatchPlan(ordered, [], _PUSHED_ASIDE * sum(costs.wide.of(*shape(part)) for part in parts))
    return min(narrow, wide, key=lambda found: found.ms)


def _side_by_side(times: Sequence[float], lanes: int) -> float:
    """When the last of `times` ends: each, the longest first, goes to the lane that is free first."""
    ends = [0.0] * lanes
    for each in times:
        heapq.heapreplace(ends, ends[0] + each)
    return max(ends)


def split_by_length(lengths: Sequence[int], max_tokens: int, longest: int, cost: CostModel) -> list[list[int]]:
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
                choices.append((best[end - count] + cost.of(count, padded), count))
        least, count = min(choices)
        best.append(least)
        taken.append(count)
    parts = []
    end = len(order)
    while end:
        parts.append(order[end - taken[end] : end])
        end -= taken[end]
    return parts[::-1]
