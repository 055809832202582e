"""How much faster one executor is than another, in seconds: the same work by turns, by CPU time, in one run.

Absolute times say little on a machine that others use too; the ratio of two runs a moment apart does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from runtime.encoding.encoder import Encoder
from runtime.generation.grouping import pool_for
from runtime.graph import Tensors
from runtime.step import Batch, Row, StepExecutor

ROUNDS, FEWEST_ROUNDS = 5, 3
LIMIT_SECONDS = 10.0  # of CPU time, after which the fewest rounds are enough
PASS_SECONDS = 0.3  # what one pass of an encoder should take
DECODE_ROWS, DECODE_STEPS = 8, 12

Work = Callable[[], object]
Clock = Callable[[], float]


def speed_ratios(
    reference: Work, candidate: Work, fewest: int = FEWEST_ROUNDS, clock: Clock = time.process_time
) -> list[float]:
    """2.0: `candidate` does the work in half the time of `reference`. One of each round: at least `fewest`, and up to
    `ROUNDS` while there is time."""
    reference(), candidate()  # kernels are made for shapes when these are first seen
    began, ratios = clock(), list[float]()
    while len(ratios) < fewest or (len(ratios) < ROUNDS and clock() - began < LIMIT_SECONDS):
        turns = (reference, candidate) if len(ratios) % 2 == 0 else (candidate, reference)
        took = {work: _seconds(work, clock) for work in turns}
        ratios.append(took[reference] / max(took[candidate], 1e-9))
    return ratios


def _seconds(work: Work, clock: Clock) -> float:
    began = clock()
    work()
    return clock() - began


def texts_for_a_pass(encoder: Encoder, requests: Sequence[Tensors], clock: Clock = time.process_time) -> int:
    """How many of the requests `encoder` computes in about `PASS_SECONDS`; at least eight."""
    few = requests[:8]
    encoder.run(few)
    seconds = max(_seconds(lambda: encoder.run(few), clock), 1e-6)
    return max(len(few), min(len(requests), int(len(few) * PASS_SECONDS / seconds)))


def decoder_work(executor: StepExecutor, capacities: Sequence[int], rows: NDArray[np.int64], encodes: bool) -> Work:
    """Prompts of mixed length, each by itself, then steps of all rows together, as with that many streams.

    `rows` [rows, length] are tokens; `encodes`: each row's tokens are the source of an encoder-decoder as well.
    """
    count, length = rows.shape
    steps = min(DECODE_STEPS, length // 2)
    pool = pool_for(length, capacities)
    prompts = np.maximum(1, (length - steps) * np.arange(1, count + 1) // count)

    def work() -> None:
        for row, tokens in enumerate(prompts.tolist()):
            if encodes:
                executor.encode(Row(pool, row), rows[row, :tokens])
            executor.run([Batch(pool, row, rows[row : row + 1, :tokens], np.zeros(1, np.int64))])
        for step in range(steps):
            at = prompts + step
            executor.run([Batch(pool, 0, np.take_along_axis(rows, at[:, None], axis=1), at)])

    return work
