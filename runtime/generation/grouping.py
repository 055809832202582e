"""Which rows decode in one call. Pure arithmetic.

A decode call reads all weights once, and for each row every position of its pool's capacity, filled or not. (Measured
for a Llama shape of 110 M at w8 on two cores: 6.5 ms for the weights, 2.9 us a position, 1.3 ms a row whatever its
pool.) So rows of unlike length are cheaper apart as soon as the empty positions cost more than the weights:
8 rows of 128 beside one of 2048 save 15360 positions a step against one reading of the weights, about 2200 positions.
A row that moves is copied, which costs about twice what one step reads of it.
"""

from __future__ import annotations

from collections.abc import Sequence

_HORIZON_STEPS = 16  # a move must pay for itself within this many steps
_COPY = 2  # a copied position is read and written


def pool_for(need: int, capacities: Sequence[int]) -> int:
    """The smallest pool that holds `need` positions. Raises ValueError where none does."""
    for pool, capacity in enumerate(capacities):
        if capacity >= need:
            return pool
    raise ValueError(f"{need} positions, and the largest pool has {capacities[-1]}")


def choose_pools(needs: Sequence[int], capacities: Sequence[int], call_cost: int) -> list[int]:
    """The pool of each row, so that a step costs least. `needs` are positions; `call_cost` in positions.

    A row may go to any pool that holds it. Dynamic programme over the pools, the largest in use is always open.
    """
    smallest = [pool_for(need, capacities) for need in needs]
    counts = [smallest.count(pool) for pool in range(len(capacities))]
    best: dict[int, tuple[int, tuple[int, ...]]] = {-1: (0, ())}  # last open pool: cost up to it, pools open
    for pool, capacity in enumerate(capacities):
        options = []
        for last, (cost, opened) in best.items():
            rows = sum(counts[last + 1 : pool + 1])
            options.append((cost + rows * capacity + call_cost, (*opened, pool)))
        best[pool] = min(options)
    last = max(smallest, default=-1)
    opened = best[last][1]
    return [next(pool for pool in opened if pool >= own) for own in smallest]


def regroup(current: Sequence[int], needs: Sequence[int], capacities: Sequence[int], call_cost: int) -> list[int]:
    """The pool of each row, given where it is: what has outgrown its pool moves, the rest only where that pays."""
    target = choose_pools(needs, capacities, call_cost)
    forced = [
        wanted if capacities[pool] < need else pool for pool, wanted, need in zip(current, target, needs, strict=True)
    ]
    saved = _step_cost(forced, capacities, call_cost) - _step_cost(target, capacities, call_cost)
    copied = sum(_COPY * need for a, b, need in zip(forced, target, needs, strict=True) if a != b)
    return target if saved * _HORIZON_STEPS > copied else forced


def _step_cost(pools: Sequence[int], capacities: Sequence[int], call_cost: int) -> int:
    return len(set(pools)) * call_cost + sum(capacities[pool] for pool in pools)
