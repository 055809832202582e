"""Ranks on CPU: tensor x pipeline processes, on one host or several, each with its part of the graph and of the cache.

The driver sends a step's tokens to every rank, stages pass activations on among themselves, and the last stage returns
logits. The batches of a step share no row, so all of them are sent at once and the stages work on different ones at
the same time. States never leave their rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from runtime.ranks.group import RankStep
from runtime.ranks.hosts import Hosts, ranks_here
from runtime.ranks.step_group import STEP_SECONDS, RankGroupHolder, start_group
from runtime.ranks.stored import load_programs
from runtime.rows import CacheShape
from runtime.step import Batch, Copy, Logits


class RankStepExecutor(RankGroupHolder):
    """`shape` is that of every cache tensor on one rank. Raises BadEnvironment or ServerFault."""

    every = False

    def __init__(
        self,
        manifest: Path,
        capacities: Sequence[int],
        rows: int,
        *,
        shape: CacheShape,
        vocabulary: int,
        threads: int,
        step_seconds: float = STEP_SECONDS,
        hosts: Hosts | None = None,
    ) -> None:
        stored = load_programs(manifest)
        here = ranks_here(hosts, stored.layout.ranks)
        super().__init__(step_seconds, hosts)
        self._stored = stored.with_threads(max(1, threads // here))
        self._capacities, self._rows, self._shape = tuple(capacities), rows, shape
        self._maker = stored.maker("logits")
        self.vocabulary, self.stages = vocabulary, stored.layout.pipeline
        weights = sum(file.stat().st_size for file in manifest.parent.glob("*.data"))
        caches = sum(len(program.states) for program in stored.programs)
        position_bytes = caches * shape.heads * shape.head_dim * np.dtype(shape.dtype).itemsize
        self.call_cost = weights // max(position_bytes, 1) // 2  # as of one process: all of it is shared out alike
        try:
            self.reset()
        except BaseException:
            self.close()
            raise

    def reset(self) -> None:
        self.end_group()
        self._group = start_group(
            self._stored,
            lambda group: group.reserve(self._shape, self._capacities, self._rows),
            self._gathering,
        )

    def run(self, batches: Sequence[Batch]) -> list[Logits]:
        steps = [self._step(batch) for batch in batches]
        rows = [(batch.pool, batch.first, len(batch.input_ids)) for batch in batches]
        results = self.running.run_rows(steps, rows, seconds=self.step_seconds)
        logits = [np.asarray(result[self._maker]["logits"], np.float32) for result in results]
        return [array.reshape(len(array), self.vocabulary) for array in logits]

    def copy(self, copies: Sequence[Copy]) -> None:
        if copies:
            self.running.copy_rows(copies, seconds=self.step_seconds)

    def _step(self, batch: Batch) -> list[RankStep]:
        rows, length = batch.input_ids.shape
        feeds = {
            "input_ids": batch.input_ids,
            "write_indices": batch.write_indices,
            "last_index": np.full(rows, length - 1, np.int64),
        }
        return [
            (
                {name: array for name, array in feeds.items() if name in program.inputs},
                ("logits",) if rank == self._maker else (),
            )
            for rank, program in enumerate(self._stored.programs)
        ]
