"""Encoders: many sequences in, one vector each out, with little padding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.encoding.batching import padded_length, plan
from runtime.encoding.cost import USUAL, Costs, Shape, measure, shapes
from runtime.encoding.executor.onnxruntime import OnnxRuntimeExecutor
from runtime.encoding.executor.openvino import OpenVinoExecutor
from runtime.encoding.executor.rank_keeper import RankExecutor
from runtime.errors import BadEnvironment
from runtime.graph import GraphExecutor, Tensors
from runtime.settings import EncoderModelSettings

FIT_SECONDS = 1.5  # of a start: enough for each shape twice with a small model on an old CPU


class Encoder:
    """An executor behind the length-sorted split. Used by the Triton model, the checks and the benchmarks alike."""

    def __init__(
        self, executor: GraphExecutor, tokens_per_batch: int, max_length: int, close: Callable[[], None] | None = None
    ) -> None:
        """`close` ends what the executor has started; without it there is nothing to end."""
        self.executor = executor
        self.close = close or (lambda: None)
        self._tokens_per_batch, self._max_length = tokens_per_batch, max_length
        self.costs = Costs(USUAL, executor.lanes)

    def run(self, requests: Sequence[Tensors]) -> list[NDArray[np.float32]]:
        """Vectors for each request, [rows, width].

        `requests[i]` holds `input_ids` and `attention_mask` (and `token_type_ids`), each [rows, length]; rows and
        lengths differ from request to request. Rows are regrouped across requests.
        """
        owner = [(index, row) for index, feeds in enumerate(requests) for row in range(len(feeds["input_ids"]))]
        lengths = [int(n) for feeds in requests for n in np.count_nonzero(feeds["attention_mask"], axis=1)]
        planned = plan(lengths, self._tokens_per_batch, self._max_length, self.costs)
        parts = [*planned.wide, *planned.narrow]
        batches = [
            _gather(requests, [owner[i] for i in part], self._padded(max(lengths[i] for i in part))) for part in parts
        ]
        outputs: list[NDArray[np.float32] | None] = [None] * len(owner)
        for part, vectors in zip(parts, self.executor.run_all(batches, len(planned.wide)), strict=True):
            for position, vector in zip(part, vectors, strict=True):
                outputs[position] = vector
        ends = np.cumsum([len(feeds["input_ids"]) for feeds in requests])
        rows = np.stack([vector for vector in outputs if vector is not None])
        return np.split(rows, ends[:-1])

    def _padded(self, length: int) -> int:
        return padded_length(max(length, 1), self._max_length)  # a warm-up request of Triton's is all padding

    def warm_up(self, inputs: Sequence[str], lengths: Sequence[int]) -> None:
        """One sequence of each length: kernels are made for shapes when these are first seen."""
        for length in lengths:
            self.run([{name: np.full((1, length), int(name == "attention_mask"), np.int64) for name in inputs}])

    def fit(self, inputs: Sequence[str], seconds: float = FIT_SECONDS, shared: bool = False) -> Costs:
        """Measures what parts cost on this machine, within about `seconds`, and splits by that from here on.

        `shared`: others compute on the same cores, so no part can have all of them for itself.
        """

        def batch(shape: Shape) -> Tensors:
            return {name: np.full(shape, int(name == "attention_mask"), np.int64) for name in inputs}

        lanes, wanted = self.executor.lanes, shapes(self._tokens_per_batch, self._max_length)
        alone = lanes == 1 or shared
        share = seconds if alone else seconds / 2
        lane = measure(lambda shape: self.executor.run_all([batch(shape)] * lanes), wanted, share)
        wide = None if alone else measure(lambda shape: self.executor.run_all([batch(shape)], 1), wanted, share)
        self.costs = Costs(lane, lanes, wide)
        return self.costs


def _gather(requests: Sequence[Tensors], rows: Sequence[tuple[int, int]], length: int) -> dict[str, NDArray[Any]]:
    """Rows of several requests in one batch of `length` tokens. The padding that falls away is masked out anyway."""
    batch = {}
    for name in requests[rows[0][0]]:
        first = requests[rows[0][0]][name]
        stacked = np.zeros((len(rows), length), first.dtype)
        for target, (index, row) in enumerate(rows):
            source = requests[index][name][row, :length]
            stacked[target, : len(source)] = source
        batch[name] = stacked
    return batch


def open_encoder(settings: EncoderModelSettings, files: Mapping[str, Path], device: int = 0) -> Encoder:
    """The encoder that the settings name; `close` it. Raises BadEnvironment where this machine cannot run it."""
    threads = settings.cores
    shape = (settings.tokens_per_batch, settings.max_length)
    if settings.executor == "openvino":
        return Encoder(OpenVinoExecutor(files["cpu"], threads=threads, bfloat16=settings.bfloat16), *shape)
    if settings.executor == "onnxruntime":
        return Encoder(OnnxRuntimeExecutor(files["cpu"], threads=threads), *shape)
    if settings.executor == "ranks":
        ranks = RankExecutor(files["cpu"], threads=threads)
        return Encoder(ranks, *shape, close=ranks.close)
    from runtime.tensorrt.graph_executor import TensorRtRtxExecutor

    return Encoder(TensorRtRtxExecutor(files, device), *shape)


def require_numpy_1(version: str = np.__version__) -> None:
    """Triton 2.51's Python backend reads tensors as garbage under numpy 2, without an error."""
    if int(version.split(".")[0]) >= 2:
        raise BadEnvironment(
            f"numpy {version} corrupts tensors in Triton's Python backend without an error; "
            "install numpy<2 (pip install 'numpy<2')"
        )
