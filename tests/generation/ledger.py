"""An executor over memory that remembers which tokens it holds, and of which source."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from runtime.errors import ServerFault
from runtime.step import Batch, Copy, Logits, Row, Tokens

VOCABULARY = 50
_EMPTY, _UNKNOWN = -1, -2  # zeros; what a new memory holds, or another tenant has left
_NO_SOURCE = (_UNKNOWN,)


class Ledger:
    """A cache that holds the tokens themselves, and logits that depend on all of a row's tokens and on its source.

    It fails where a real one would go wrong in silence: a position written twice or left out, a row outside its pool,
    something of another tenant behind a row's tokens, a row with the source of another or with none. An engine takes
    that for a fault of the executor and goes on, so `misused` tells the test.
    """

    vocabulary, call_cost, every = VOCABULARY, 10, False

    def __init__(self, capacities: Sequence[int], rows: int, stages: int = 1, *, encoder: bool = False) -> None:
        self._capacities, self._rows, self.stages, self._encoder = capacities, rows, stages, encoder
        self.steps: list[int] = []  # tokens of each step
        self.broken = False
        self.misused: list[str] = []
        self.reset()

    def reset(self) -> None:
        self._cells = [np.full((self._rows, capacity), _UNKNOWN, np.int64) for capacity in self._capacities]
        self._sources = {Row(p, r): _NO_SOURCE for p in range(len(self._capacities)) for r in range(self._rows)}

    def run(self, batches: Sequence[Batch]) -> list[Logits]:
        if self.broken:
            self.broken = False
            raise ServerFault("pulled the plug")
        self.steps.append(sum(batch.input_ids.size for batch in batches))
        touched = [(batch.pool, row) for batch in batches for row in batch.rows]
        self._require(len(touched) == len(set(touched)), "two batches of one step share a row")
        return [self._run(batch) for batch in batches]

    def _run(self, batch: Batch) -> Logits:
        cells, length = self._cells[batch.pool], batch.input_ids.shape[1]
        self._require(length == 1 or len(batch.input_ids) == 1, "rows of more than one token in one batch")
        logits = np.zeros((len(batch.input_ids), VOCABULARY), np.float32)
        for index, (row, start) in enumerate(zip(batch.rows, batch.write_indices, strict=True)):
            end = start + length
            self._require(end <= cells.shape[1], "written past the capacity")
            self._require(bool((cells[row, start:] == _EMPTY).all()), "something lies where the row has no tokens yet")
            cells[row, start:end] = batch.input_ids[index]
            self._require(bool((cells[row, :end] >= 0).all()), "a position was never written")
            source = self._sources[Row(batch.pool, row)]
            self._require(not self._encoder or source not in ((), _NO_SOURCE), "the row has no source")
            logits[index, follower(cells[row, :end], source if self._encoder else ())] = 1.0
        return logits

    def copy(self, copies: Sequence[Copy]) -> None:
        for source, target, tokens in copies:
            cells = self._cells[target.pool][target.place]
            if source is not None:
                cells[:tokens] = self._cells[source.pool][source.place][:tokens]
            cells[tokens:] = _EMPTY
            self._sources[target] = () if source is None else self._sources[source]

    def encode(self, row: Row, source: Tokens) -> None:
        self._require(self._encoder, "no encoder")
        self._require(len(source) <= self._capacities[row.pool], "the source does not fit the row")
        self._require(self._sources[row] == (), "the row was not made free")
        self._sources[row] = tuple(source.tolist())

    def _require(self, sound: bool, otherwise: str) -> None:
        if not sound:
            self.misused.append(otherwise)
            raise AssertionError(otherwise)

    def lost(self) -> bool:
        return False

    def close(self) -> None: ...


def follower(tokens: NDArray[np.int64], source: Sequence[int] = ()) -> int:
    before = sum((place + 3) * token for place, token in enumerate(source, 1))
    return int((tokens * np.arange(1, len(tokens) + 1)).sum() * 7 + len(tokens) + 11 * before) % VOCABULARY


def continuation(prompt: Sequence[int], count: int, source: Sequence[int] = ()) -> list[int]:
    """What one request alone must give; of an encoder-decoder `prompt` is the token that outputs start with."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(follower(np.array(tokens), source))
    return tokens[len(prompt) :]
