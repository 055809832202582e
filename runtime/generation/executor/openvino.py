"""OpenVINO on CPU: the faster executor for decoders. A step is one call, whatever it holds.

Each row of the slot cache is a run of blocks. A step reads the tokens that a row holds and no more, so rows of any
length share a pool, and moving a row copies blocks. Weight-only graphs compute with activations in 8 bits, quantised by
groups as the call goes (OpenVINO's dynamic quantisation), and keep keys and values in half precision; perplexity is
measured through both.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import ServerFault
from runtime.generation.executor.paged import BLOCK, paged_model, weight_block
from runtime.step import Batch, Copy, Logits, Row, Tokens


class OpenVinoStepExecutor:
    """One compiled model on all threads. Raises BadEnvironment for a graph whose attention cannot be paged."""

    stages, every = 1, True
    call_cost = 0  # all pools share one call, and a row costs what it holds

    def __init__(self, decoder: Path, capacities: Sequence[int], rows: int, *, threads: int) -> None:
        import openvino

        core = openvino.Core()
        model = paged_model(decoder, core)
        config: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": "f32",
            "KV_CACHE_PRECISION": "f32",
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": False,  # the server and its clients share these cores
        }
        block = weight_block(model)
        if block is not None:  # activations in groups of the same length: a longer one gives up integer products
            config |= {"DYNAMIC_QUANTIZATION_GROUP_SIZE": block, "KV_CACHE_PRECISION": "f16"}
        self._model = core.compile_model(model, "CPU", config)
        *_, vocabulary = self._model.output("logits").get_partial_shape()
        self.vocabulary = vocabulary.get_length()
        self._row_blocks = [-(-capacity // BLOCK) for capacity in capacities]
        self._first_blocks = np.cumsum([0, *(rows * count for count in self._row_blocks)]).tolist()
        self.reset()

    def lost(self) -> bool:
        return False

    def reset(self) -> None:
        """New memory, which the kernel gives when it is first written; the model keeps nothing of the old."""
        import openvino

        self._request = self._model.create_infer_request()
        self._inputs: dict[str, NDArray[Any]] = {}  # what the request reads
        self._caches: list[NDArray[Any]] = []
        for port in self._model.inputs:
            name = port.get_any_name()
            if "_cache_" in name:
                _, heads, block, head_dim = port.get_partial_shape()
                shape = (self._first_blocks[-1], heads.get_length(), block.get_length(), head_dim.get_length())
                self._caches.append(np.zeros(shape, port.get_element_type().to_dtype()))
                self._request.set_tensor(name, openvino.Tensor(self._caches[-1], shared_memory=True))

    def run(self, batches: Sequence[Batch]) -> list[Logits]:
        if not batches:
            return []
        lengths = np.concatenate([np.full(len(batch.input_ids), batch.input_ids.shape[1]) for batch in batches])
        pasts = np.concatenate([batch.write_indices for batch in batches])
        blocks = [
            self._blocks(Row(batch.pool, batch.first + row), past + batch.input_ids.shape[1])
            for batch in batches
            for row, past in enumerate(batch.write_indices.tolist())
        ]
        begins = np.concatenate([[0], np.cumsum(lengths)])
        feeds = {
            "input_ids": np.concatenate([batch.input_ids.ravel() for batch in batches])[:, None],
            "write_indices": np.repeat(pasts - begins[:-1], lengths) + np.arange(begins[-1]),
            "past_lens": pasts,
            "subsequence_begins": begins,
            "block_indices": np.concatenate(blocks),
            "block_indices_begins": np.cumsum([0, *map(len, blocks)]),
            "max_context_len": (pasts + lengths).max(),
            "sampled": _sampled(batches, begins),
        }
        for name, array in feeds.items():
            self._feed(name, array)
        try:
            self._request.infer()
        except RuntimeError as error:
            raise ServerFault(f"OpenVINO did not run the step: {error}") from error
        logits = self._request.get_tensor("logits").data.reshape(-1, self.vocabulary)
        counts = [batch.input_ids.shape[1] if batch.every else len(batch.input_ids) for batch in batches]
        ends = np.cumsum(counts).tolist()
        return [logits[end - count : end] for count, end in zip(counts, ends, strict=True)]

    def _feed(self, name: str, array: NDArray[np.int64]) -> None:
        """Most steps have the shapes of the one before, and need no new tensors: that is a tenth of a small step."""
        import openvino

        held = self._inputs.get(name)
        if held is not None and held.shape == array.shape:
            held[...] = array
            return
        wide = name in ("input_ids", "write_indices")
        self._inputs[name] = held = np.array(array, np.int64 if wide else np.int32)
        self._request.set_tensor(name, openvino.Tensor(held, shared_memory=True))

    def _blocks(self, row: Row, tokens: int) -> NDArray[np.int64]:
        """Those that hold the first `tokens` of a row. Raises ServerFault past its end: the next row begins there."""
        count = -(-tokens // BLOCK)
        if count > self._row_blocks[row.pool]:
            raise ServerFault(f"{tokens} tokens in a row of {self._row_blocks[row.pool] * BLOCK}")
        start = self._first_blocks[row.pool] + row.place * self._row_blocks[row.pool]
        return np.arange(start, start + count)

    def copy(self, copies: Sequence[Copy]) -> None:
        """Whole blocks. What lies behind the tokens of a row is never read, so nothing is zeroed."""
        for source, target, tokens in copies:
            if source is not None and source != target:
                origin, destination = self._blocks(source, tokens), self._blocks(target, tokens)
                for cache in self._caches:
                    cache[destination] = cache[origin]

    def encode(self, row: Row, source: Tokens) -> None:
        raise ServerFault("encoder-decoders run on ONNX Runtime; set serving.executor: onnxruntime")

    def close(self) -> None:
        self._caches.clear()


def _sampled(batches: Sequence[Batch], begins: NDArray[np.int64]) -> NDArray[np.int64]:
    """The tokens whose logits are wanted: the last of each sequence, or each of it."""
    last: NDArray[np.int64] = begins[1:] - 1
    if not any(batch.every for batch in batches):
        return last
    parts, row = [], 0
    for batch in batches:
        rows = slice(row, row + len(batch.input_ids))
        parts.append(np.arange(begins[row], begins[row + 1]) if batch.every else last[rows])
        row = rows.stop
    return np.concatenate(parts)
