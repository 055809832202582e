"""The memory of a slot cache in plain arrays: for executors that compute on the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.step import Copy, Row


@dataclass(frozen=True)
class CacheShape:
    """One cache tensor of the graph, [batch, heads, positions, head_dim]."""

    heads: int
    head_dim: int
    dtype: str


class Pools:
    """One array for each pool and cache tensor, [rows, heads, capacity, head_dim].

    The kernel gives memory when a row is first written, so rows that were never used cost nothing.
    """

    def __init__(self, shapes: Mapping[str, CacheShape], capacities: Sequence[int], rows: int) -> None:
        self.arrays: list[dict[str, NDArray[Any]]] = [
            {name: np.zeros((rows, s.heads, capacity, s.head_dim), s.dtype) for name, s in shapes.items()}
            for capacity in capacities
        ]

    def view(self, pool: int, first: int, rows: int) -> dict[str, NDArray[Any]]:
        """Contiguous rows of every cache tensor; what is written there stays."""
        return {name: array[first : first + rows] for name, array in self.arrays[pool].items()}

    def copy(self, copies: Sequence[Copy], whole: frozenset[str] = frozenset()) -> None:
        """In order. Tensors named in `whole` are copied as far as both rows reach, the others up to `tokens`."""
        for source, target, tokens in copies:
            for name, array in self.arrays[target.pool].items():
                length = 0
                if source is not None:
                    origin = self.arrays[source.pool][name]
                    length = min(array.shape[2], origin.shape[2]) if name in whole else tokens
                    array[target.place, :, :length] = origin[source.place, :, :length]
                array[target.place, :, length:] = 0

    def row(self, row: Row, name: str) -> NDArray[Any]:
        """[heads, capacity, head_dim]"""
        array: NDArray[Any] = self.arrays[row.pool][name][row.place]
        return array
