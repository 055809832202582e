"""What a part of a batch costs on this machine: measured once at the start, read by the split. Pure but for `measure`.

A part's time is not in proportion to its tokens: a small one pays a fixed cost, one that outgrows the caches pays for
memory. Where that happens differs from CPU to CPU (on one without AVX-512, texts/s halve between batches of 8 and 32).
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

Shape = tuple[int, int]  # sequences, padded tokens of each

USUAL_LENGTH = 32  # of the shapes that are measured; longer rows add attention
_ROUNDS = 4  # of every shape, each after another shape, as in service; the least of them counts


@dataclass(frozen=True)
class CostModel:
    """Milliseconds by padded tokens, linear between the measured points and beyond the last two of them.

    `per_token_and_length`: ms for each token and each token of its row beyond USUAL_LENGTH.
    """

    tokens: tuple[int, ...]
    milliseconds: tuple[float, ...]
    per_token_and_length: float = 0.0

    def of(self, count: int, length: int) -> float:
        """ms of `count` sequences of `length` padded tokens; never 0."""
        tokens = count * length
        return self.of_tokens(tokens) + self.per_token_and_length * tokens * max(0, length - USUAL_LENGTH)

    @property
    def summary(self) -> str:
        points = zip(self.tokens, self.milliseconds, strict=True)
        return "ms by tokens " + ", ".join(f"{tokens}: {ms:.1f}" for tokens, ms in points)

    def of_tokens(self, tokens: int) -> float:
        """ms of that many tokens in rows of usual length."""
        if len(self.tokens) == 1:
            return self.milliseconds[0] * max(1.0, tokens / self.tokens[0])
        right = min(max(bisect_left(self.tokens, tokens), 1), len(self.tokens) - 1)
        (a, b), (low, high) = self.tokens[right - 1 : right + 1], self.milliseconds[right - 1 : right + 1]
        return max(low + (high - low) / (b - a) * (tokens - a), low / 2)


@dataclass(frozen=True)
class Costs:
    """`lane`: of a part while every lane has one. `wide`: of a part that has all cores to itself; None where the
    executor cannot do that."""

    lane: CostModel
    lanes: int = 1
    wide: CostModel | None = None

    @property
    def summary(self) -> str:
        """One line for the log."""
        said = f"{self.lane.summary} on each of {self.lanes} lanes" if self.lanes > 1 else self.lane.summary
        return f"{said}; alone on all cores: {self.wide.summary}" if self.wide is not None else said


# MiniLM in fp32 on one core: 3 ms a part beside 0.09 ms a token, and attention as dear as the rest at 2000 tokens.
USUAL = CostModel((16, 1024), (4.5, 96.5), 0.09 / 2000)


def shapes(most_tokens: int, longest: int) -> list[Shape]:
    """What is measured: parts of usual length up to `most_tokens`, the cheapest first, and one row of `longest`."""
    length = min(USUAL_LENGTH, longest)
    found = [(1, max(1, length // 2)), (1, length)]
    while 2 * found[-1][0] * length <= most_tokens:
        found.append((2 * found[-1][0], length))
    return [*found, (1, longest)] if longest > length else found


def measure(run: Callable[[Shape], object], wanted: Sequence[Shape], seconds: float) -> CostModel:
    """Runs each shape a few times, in turn. Ends after `seconds` and the shape under way; every model has a point.

    `run` returns when the shape has been computed. `wanted` as `shapes` gives it.
    """
    end = time.perf_counter() + seconds
    best: dict[Shape, float] = {}
    for round_number in range(_ROUNDS + 1):
        for shape in wanted:
            if best and time.perf_counter() > end:
                return fitted(best)
            started = time.perf_counter()
            run(shape)
            taken = (time.perf_counter() - started) * 1e3
            # The first round makes the kernels; it counts only where there is time for no other.
            best[shape] = taken if round_number <= 1 else min(best[shape], taken)
    return fitted(best)


def fitted(best: dict[Shape, float]) -> CostModel:
    """The model through measured shapes: usual lengths give its points, longer rows what attention adds."""
    usual = sorted((count * length, ms) for (count, length), ms in best.items() if length <= USUAL_LENGTH)
    # Other work on the cores only adds: what a larger part took bounds a smaller one.
    least = list(accumulate((ms for _, ms in reversed(usual)), min))[::-1]
    model = CostModel(tuple(tokens for tokens, _ in usual), tuple(least))
    added = [
        (ms - model.of_tokens(count * length)) / (count * length * (length - USUAL_LENGTH))
        for (count, length), ms in best.items()
        if length > USUAL_LENGTH
    ]
    return replace(model, per_token_and_length=max(0.0, *added)) if added else model
