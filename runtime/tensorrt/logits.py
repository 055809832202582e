"""Logits that stay on the GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.step import Logits, Tokens

Fetch = Callable[[Sequence[int]], Logits]


class DeviceLogits:
    """[rows, vocabulary], float32, as far as anybody looks at it: an array to the sampler. Valid until the next `run`.

    `argmax` costs nothing, for every row's largest logit and its token came back with the step. A row comes when it is
    asked for: 128 rows of a vocabulary of 128k are 64 MB, milliseconds on the way to the host.
    """

    def __init__(self, top: NDArray[np.float32], vocabulary: int, fetch: Fetch) -> None:
        """`top` is [rows, 2]: the largest logit, and its token. `fetch` brings rows from the device."""
        self._top = top
        self._largest, self._tokens = top[:, 0], top[:, 1].astype(np.int64)
        self.shape = (len(top), vocabulary)
        self._fetch = fetch
        self._rows: dict[int, Logits] = {}

    def __len__(self) -> int:
        return self.shape[0]

    def argmax(self, axis: int) -> Tokens:
        """[rows]. Of a row with a NaN it means nothing; `logits[row, token]` is not finite then."""
        if axis not in (1, -1):
            raise ValueError(f"argmax over axis {axis}; the tokens of a row are on axis 1")
        return self._tokens.copy()

    def __getitem__(self, index: Any) -> Any:
        """`logits[[0, 3]]`: a copy of these rows. `logits[rows, tokens]`: a value each. `logits[1:3]`: a view, as lazy
        as the whole.
        """
        if isinstance(index, slice):
            rows = range(len(self))[index]
            return DeviceLogits(self._top[index], self.shape[1], lambda some: self._take([rows[row] for row in some]))
        if isinstance(index, list):
            return self._take(index)
        if isinstance(index, tuple) and len(index) == 2 and all(isinstance(part, np.ndarray) for part in index):
            return self._values(*index)
        return np.asarray(self)[index]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        rows = self._take(range(len(self)))
        return rows if dtype is None else rows.astype(dtype)

    def _take(self, rows: Sequence[int]) -> Logits:
        absent = [row for row in dict.fromkeys(rows) if row not in self._rows]
        if absent:
            self._rows |= dict(zip(absent, self._fetch(absent), strict=True))
        return np.stack([self._rows[row] for row in rows]) if len(rows) else np.empty((0, self.shape[1]), np.float32)

    def _values(self, rows: NDArray[np.int64], tokens: Tokens) -> NDArray[np.float32]:
        values = self._largest[rows]
        for place in np.flatnonzero(tokens != self._tokens[rows]):
            values[place] = self._take([int(rows[place])])[0, tokens[place]]
        return values
