"""OpenVINO on CPU: the faster executor for encoders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from runtime.graph import Tensors

_WIDE_BYTES = 1 << 30  # of a graph and its weights: a wider stream keeps the weights in memory a second time


class OpenVinoExecutor:
    """A graph compiled for one single-threaded stream a core, and once more for one stream that has all cores.

    Streams run whole batches side by side. That beats all threads sharing one batch, because the matrices of an
    encoder are too small to split well. A batch that is alone is faster with all cores all the same.
    """

    def __init__(self, graph: Path, *, threads: int, bfloat16: bool) -> None:
        import openvino

        core = openvino.Core()
        supported = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        arithmetic = "bf16" if bfloat16 and supported else "f32"
        model = core.read_model(str(graph))
        config = {
            "INFERENCE_PRECISION_HINT": arithmetic,
            "INFERENCE_NUM_THREADS": threads,
            "ENABLE_CPU_PINNING": False,  # the tokenizer and the server share these cores
        }

        def queue(streams: int) -> openvino.AsyncInferQueue:
            compiled = core.compile_model(model, "CPU", {**config, "NUM_STREAMS": streams})
            made = openvino.AsyncInferQueue(compiled, streams)
            made.set_callback(self._collect)
            return made

        small = sum(file.stat().st_size for file in graph.parent.glob(f"{graph.name}*")) <= _WIDE_BYTES
        self._lanes = threads
        self._narrow = queue(threads)
        self._wide = queue(1) if threads > 1 and small else self._narrow
        self._description = f"OpenVINO {openvino.__version__.split('-')[0]} {arithmetic}"

    @property
    def description(self) -> str:
        return self._description

    @property
    def lanes(self) -> int:
        return self._lanes

    def run_all(self, batches: Sequence[Tensors], wide: int = 0) -> list[NDArray[np.float32]]:
        results: list[NDArray[np.float32]] = [np.empty(0, np.float32)] * len(batches)
        for queue, indices in ((self._wide, range(wide)), (self._narrow, range(wide, len(batches)))):
            for index in indices:
                queue.start_async(dict(batches[index]), (results, index), share_inputs=True)
            queue.wait_all()
        return results

    @staticmethod
    def _collect(request: object, slot: tuple[list[NDArray[np.float32]], int]) -> None:
        results, index = slot
        results[index] = request.get_output_tensor(0).data.copy()  # type: ignore[attr-defined]
