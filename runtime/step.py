"""The seam between generation and what runs the graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int64]
Logits = NDArray[np.float32]


class Row(NamedTuple):
    """Where one sequence's keys and values lie. Rows of a pool have the same capacity in positions."""

    pool: int
    place: int


class Copy(NamedTuple):
    """The first `tokens` positions of one row, to another; pools may differ. The rest of the target becomes zero.

    Without a source, all of it does: a NaN that an earlier tenant left would spoil sums, masked or not. A row may be
    its own source: then only its rest becomes zero. With a source, cross caches come along, also for 0 tokens.
    """

    source: Row | None
    target: Row
    tokens: int


@dataclass(frozen=True, eq=False)
class Batch:
    """One call: rows `first` … of a pool. All real tokens; a batch of more than one row has length 1.

    `every`: the logits of each token are wanted, [length, vocabulary] of one row. Only for executors that can.
    """

    pool: int
    first: int
    input_ids: Tokens  # [rows, length]
    write_indices: Tokens  # [rows]: tokens already there
    every: bool = False

    @property
    def rows(self) -> range:
        return range(self.first, self.first + len(self.input_ids))


class StepExecutor(Protocol):
    """Owns the caches. Called from one thread. Whatever it raises, its caches count as lost; `reset` starts anew.

    Logits may come when somebody looks at them. What they raise then ends the request that is looked at, but a
    ServerFault is the executor's, as if `run` had raised it.
    """

    vocabulary: int
    stages: int  # batches that can be under way at once: the stages of a pipeline
    call_cost: int  # what a call costs beside its rows, in cache positions read (see `grouping`)
    every: bool  # whether it can give the logits of each token of a batch; else a prompt is scored token by token

    def run(self, batches: Sequence[Batch]) -> list[Logits]:
        """Logits of each row's last token, [rows, vocabulary], or of `every`; valid until the next call. Batches share
        no row.
        """

    def copy(self, copies: Sequence[Copy]) -> None:
        """Carries out copies, in order. Cross-attention caches go with their row as a whole."""

    def encode(self, row: Row, source: Tokens) -> None:
        """Encoder-decoders: runs the encoder on `source`, [length], and fills the row's cross-attention cache."""

    def lost(self) -> bool:
        """Whether it can only be `reset`: a part of it has died."""

    def reset(self) -> None:
        """Ready again after a fault, with empty caches. May take long, but not for ever. Whatever it raises, it may be
        called again, but for DeviceLost: that only a new process mends.
        """

    def close(self) -> None: ...
