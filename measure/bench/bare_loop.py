"""The executor in a loop of its own, with nothing around it: what a served engine is measured against."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from runtime.step import Batch, StepExecutor


@dataclass(frozen=True)
class BareLoop:
    """Seconds for all prompts, and for all decode steps. Every row makes `new_tokens`, the first from its prompt."""

    rows: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.rows * self.new_tokens / (self.prefill_seconds + self.decode_seconds)

    @property
    def decode_tokens_per_second(self) -> float:
        return self.rows * (self.new_tokens - 1) / self.decode_seconds


def bare_loop(executor: StepExecutor, pool: int, rows: int, prompt_tokens: int, new_tokens: int) -> BareLoop:
    """Prompts one after the other in one call each, then greedy decode of all rows together in one pool.

    Random prompts of equal length; the pool must hold `prompt_tokens + new_tokens - 1` positions. It overwrites what
    the pool holds, so the engine over the same executor must be idle, and its cache cleared after.
    """
    random = np.random.default_rng(0)
    tokens = np.zeros((rows, 1), np.int64)
    began = time.perf_counter()
    for row in range(rows):
        ids = random.integers(0, executor.vocabulary, (1, prompt_tokens))
        tokens[row] = executor.run([Batch(pool, row, ids, np.zeros(1, np.int64))])[0].argmax(axis=1)
    decoding = time.perf_counter()
    for step in range(new_tokens - 1):
        positions = np.full(rows, prompt_tokens + step, np.int64)
        tokens[:, 0] = executor.run([Batch(pool, 0, tokens, positions)])[0].argmax(axis=1)
    return BareLoop(rows, new_tokens, decoding - began, time.perf_counter() - decoding)


def mean_loop(rounds: Sequence[BareLoop]) -> BareLoop:
    """Mean seconds of rounds of one size."""
    count = len(rounds)
    return BareLoop(
        rounds[0].rows,
        rounds[0].new_tokens,
        sum(done.prefill_seconds for done in rounds) / count,
        sum(done.decode_seconds for done in rounds) / count,
    )
