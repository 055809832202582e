"""ONNX Runtime on CPU: the reference of every check, and an executor by choice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from runtime.graph import Tensors
from runtime.session import open_session


class OnnxRuntimeExecutor:
    """One session; batches run one after the other on all threads."""

    def __init__(self, graph: Path, *, threads: int) -> None:
        import onnxruntime

        self._session = open_session(graph, threads=threads)
        self._outputs = [self._session.get_outputs()[0].name]
        self._description = f"ONNX Runtime {onnxruntime.__version__}"

    @property
    def description(self) -> str:
        return self._description

    @property
    def lanes(self) -> int:
        return 1

    def run_all(self, batches: Sequence[Tensors], wide: int = 0) -> list[NDArray[np.float32]]:
        return [self._session.run(self._outputs, dict(batch))[0] for batch in batches]
