"""The seam between encoding and what runs the graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Tensors = Mapping[str, NDArray[Any]]


class GraphExecutor(Protocol):
    """Runs one graph. Thread-safe: several batches may be under way at once."""

    @property
    def description(self) -> str:
        """Name, version and arithmetic, as reports print it: `OpenVINO 2026.4.1 bf16`."""

    @property
    def lanes(self) -> int:
        """Batches that run side by side; with 1, each has all cores anyway."""

    def run_all(self, batches: Sequence[Tensors], wide: int = 0) -> list[NDArray[np.float32]]:
        """The first output of the graph for each batch, in the order given.

        The first `wide` batches run one after the other, each on all cores; then the rest, side by side.
        """
