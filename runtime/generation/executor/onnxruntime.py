"""ONNX Runtime on CPU. Caches are bound in place: the graph's new cache is written where the old one lies.

The decoder takes `input_ids` [batch, length], `write_indices` and `last_index` [batch], and `key_cache_{i}`,
`value_cache_{i}` [batch, heads, capacity, head_dim]; it gives `logits` and `new_key_cache_{i}`, `new_value_cache_{i}`.
An encoder-decoder's decoder takes `source_length` [batch] and `cross_key_{i}`, `cross_value_{i}` besides; its encoder
gives these from `input_ids` and `source_length`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import BadEnvironment
from runtime.rows import CacheShape, Pools
from runtime.session import open_session
from runtime.step import Batch, Copy, Logits, Row, Tokens

_TYPES = {"tensor(float)": "float32", "tensor(float16)": "float16"}
_STEP_INPUTS = ("input_ids", "write_indices", "last_index")


class _Call:
    """Everything bound for one shape: to run again, write the inputs and go."""

    def __init__(self, executor: OnnxRuntimeStepExecutor, pool: int, first: int, rows: int, length: int) -> None:
        self.binding = executor.session.io_binding()
        self.ids = np.zeros((rows, length), np.int64)
        self.write_indices = np.zeros(rows, np.int64)
        self.last_index = np.full(rows, length - 1, np.int64)
        self.logits = executor.logits_rows(pool, first, rows)
        for name, array in zip(_STEP_INPUTS, (self.ids, self.write_indices, self.last_index), strict=True):
            self._bind_input(name, array)
        for name, array in executor.pools.view(pool, first, rows).items():
            self._bind_input(name, array)
            if name not in executor.cross:
                self._bind_output(f"new_{name}", array, array.shape)
        if executor.cross:
            self._bind_input("source_length", executor.source_lengths[pool][first : first + rows])
        middle = (1,) * (executor.logits_rank - 2)
        self._bind_output("logits", self.logits, (rows, *middle, executor.vocabulary))

    def _bind_input(self, name: str, array: NDArray[Any]) -> None:
        self.binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def _bind_output(self, name: str, array: NDArray[Any], shape: tuple[int, ...]) -> None:
        self.binding.bind_output(name, "cpu", 0, array.dtype.type, shape, array.ctypes.data)


class OnnxRuntimeStepExecutor:
    """One session on all threads. `spinning`: idle threads wait for work in a loop, which pays on cores of their own.

    Raises BadEnvironment for a graph with other inputs, or with a cache of fixed capacity.
    """

    stages, every = 1, False

    def __init__(
        self,
        decoder: Path,
        capacities: Sequence[int],
        rows: int,
        *,
        encoder: Path | None = None,
        threads: int,
        spinning: bool = True,
    ) -> None:
        self.session = _open(decoder, threads, spinning)
        self._encoder = None if encoder is None else _open(encoder, threads, spinning)
        given = {item.name: item for item in self.session.get_inputs()}
        caches = {name: item for name, item in given.items() if "_cache_" in name or name.startswith("cross_")}
        missing = [name for name in _STEP_INPUTS if name not in given]
        if missing or not caches:
            raise BadEnvironment(f"{decoder.name} has inputs {', '.join(given)}: no decoder with a slot cache")
        shapes = {
            name: CacheShape(heads=item.shape[1], head_dim=item.shape[3], dtype=_TYPES[item.type])
            for name, item in caches.items()
        }
        self.cross = frozenset(name for name in caches if name.startswith("cross_"))
        if bool(self.cross) != (encoder is not None):
            raise BadEnvironment(f"{decoder.name} {'needs' if self.cross else 'takes no'} encoder")
        fixed = {item.shape[2] for item in caches.values() if isinstance(item.shape[2], int)}
        if fixed and fixed != set(capacities):
            raise BadEnvironment(f"{decoder.name} has a cache of {fixed} positions; serve it with that capacity alone")
        logits = next(item for item in self.session.get_outputs() if item.name == "logits")
        self.vocabulary, self.logits_rank = int(logits.shape[-1]), len(logits.shape)
        self.capacities, self._rows = tuple(capacities), rows
        position_bytes = sum(s.heads * s.head_dim * np.dtype(s.dtype).itemsize for s in shapes.values())
        # Weights are streamed about twice as fast as caches (measured; see `grouping`).
        weights = sum(file.stat().st_size for file in decoder.parent.glob(f"{decoder.name}*") if file.suffix != ".json")
        self.call_cost = weights // position_bytes // 2
        self._shapes = shapes
        self.reset()

    def lost(self) -> bool:
        return False

    def reset(self) -> None:
        """New memory; the session keeps nothing of the old."""
        self.pools = Pools(self._shapes, self.capacities, self._rows)
        self.source_lengths = [np.ones(self._rows, np.int64) for _ in self.capacities]
        self._logits = [np.empty((self._rows, self.vocabulary), np.float32) for _ in self.capacities]
        self._decodes: dict[tuple[int, int, int], _Call] = {}

    def logits_rows(self, pool: int, first: int, rows: int) -> Logits:
        """A row's logits have one place, so that batches of one step do not write over each other."""
        return self._logits[pool][first : first + rows]

    def run(self, batches: Sequence[Batch]) -> list[Logits]:
        return [self._run(batch) for batch in batches]

    def _run(self, batch: Batch) -> Logits:
        rows, length = batch.input_ids.shape
        if length == 1:  # shapes that come back every step
            key = (batch.pool, batch.first, rows)
            call = self._decodes.get(key) or self._decodes.setdefault(key, _Call(self, *key, 1))
        else:
            call = _Call(self, batch.pool, batch.first, rows, length)
        call.ids[:] = batch.input_ids
        call.write_indices[:] = batch.write_indices
        self.session.run_with_iobinding(call.binding)
        return call.logits

    def copy(self, copies: Sequence[Copy]) -> None:
        self.pools.copy(copies, self.cross)
        if self.cross:
            for source, target, _ in copies:
                length = 1 if source is None else self.source_lengths[source.pool][source.place]
                self.source_lengths[target.pool][target.place] = length

    def encode(self, row: Row, source: Tokens) -> None:
        assert self._encoder is not None
        names = [item.name for item in self._encoder.get_outputs()]
        feeds = {"input_ids": source[None], "source_length": np.array([len(source)], np.int64)}
        for name, array in zip(names, self._encoder.run(names, feeds), strict=True):
            self.pools.row(row, name)[:, : len(source)] = array[0]
        self.source_lengths[row.pool][row.place] = len(source)

    def close(self) -> None:
        self._decodes.clear()


def _open(graph: Path, threads: int, spinning: bool) -> Any:
    entries = [("session.intra_op.allow_spinning", "1" if spinning else "0")]
    return open_session(graph, threads=threads, entries=entries)
