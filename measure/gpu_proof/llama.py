"""transformers' Llama with caches of fixed length, behind the seam that engines stand behind.

It is the peer that an engine must beat, and what the serving loop runs on where no engine does. A step of one token a
row is a CUDA graph, as gpt-fast and vLLM have it: captured once, then launched as one. Blocks are compiled one for
all, so that compiling takes seconds.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from measure.bench.decoder_graph import DecoderShape
from runtime.errors import ServerFault
from runtime.step import Batch, Copy, Logits, Row, Tokens
from runtime.tensorrt.logits import DeviceLogits

if TYPE_CHECKING:
    import torch

    # Logits [rows, vocabulary]; the largest of each row, and its token [rows, 2].
    Made = tuple[torch.Tensor, torch.Tensor]

_ATTENTION = "rows_of_one_cache"  # as transformers knows it
Run = Callable[[], object]


def llama_config(shape: DecoderShape, positions: int) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        max_position_embeddings=positions, tie_word_embeddings=False, architectures=["LlamaForCausalLM"],
    )  # fmt: skip


def new_llama(shape: DecoderShape, positions: int, dtype: str, device: str) -> Any:
    """A LlamaForCausalLM with random weights, made on the device; the same twice."""
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(llama_config(shape, positions), dtype=getattr(torch, dtype))
    return model.eval()


@dataclass(frozen=True, eq=False)
class _LayerCache:
    """What a layer's attention takes for transformers' cache: views [rows, kv_heads, capacity, head_dim].

    `fresh`: they hold nothing before these tokens, which therefore attend to each other alone.
    """

    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor  # [rows, length]
    fresh: bool

    def update(self, keys: torch.Tensor, values: torch.Tensor, _: int) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        at = torch.arange(len(keys), device=keys.device)[:, None]
        self.keys[at, :, self.positions] = keys.transpose(1, 2)
        self.values[at, :, self.positions] = values.transpose(1, 2)
        return (keys, values) if self.fresh else (self.keys, self.values)


def _attention(
    module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, scaling: float, **_: Any
) -> tuple[torch.Tensor, None]:
    """Without a mask it is causal. With one, [rows, 1, length, capacity], every slot of the cache is read: a static
    shape, as a CUDA graph wants it.
    """
    import torch

    rows, heads, length, size = q.shape
    if mask is None:
        seen = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
    else:
        # The query heads that share a key head are one matrix, so that no key is read twice.
        grouped = q.reshape(rows, k.shape[1], -1, size)
        scores = (grouped @ k.transpose(-1, -2)).float() * scaling
        unseen = ~mask.repeat(1, 1, heads // k.shape[1], 1)
        seen = scores.masked_fill(unseen, float("-inf")).softmax(-1).to(q.dtype) @ v
    return seen.reshape(rows, heads, length, size).transpose(1, 2), None


class TorchStepExecutor:
    """A `StepExecutor` over a LlamaForCausalLM, which it takes over. `compiler` is torch.compile's backend for steps of
    one token a row; `graphs`: these steps are captured and launched as CUDA graphs.

    Steps are made for 1, 2, 4, … rows and padded to the next, so that there are few of them. A padding row writes to
    the last position of a row that is not decoding, which its own token overwrites before anything reads it.
    """

    stages, every = 1, False

    def __init__(
        self, model: Any, capacities: Sequence[int], rows: int, *, compiler: str | None = None, graphs: bool = False
    ) -> None:
        import torch
        from transformers import AttentionInterface

        AttentionInterface.register(_ATTENTION, _attention)
        model.config._attn_implementation = _ATTENTION
        self.model, self.capacities, self.rows, self.graphs = model, tuple(capacities), rows, graphs
        config, head = model.config, model.lm_head.weight
        self.vocabulary = config.vocab_size
        self._eager = type(model.model.layers[0]).forward
        self._compiled = self._eager if compiler is None else _compiled(self._eager, compiler)
        line = config.num_hidden_layers, rows, config.num_key_value_heads
        # Keys and values apart: tensors that share memory and are written to are slow to call compiled code with.
        self._caches = [
            tuple(torch.zeros(*line, size, config.head_dim, dtype=head.dtype, device=head.device) for _ in "kv")
            for size in capacities
        ]
        position_bytes = 2 * line[0] * line[2] * config.head_dim * head.itemsize
        self.call_cost = sum(weight.nbytes for weight in model.parameters()) // position_bytes
        pinned = head.is_cuda
        self._given = torch.zeros(2, rows, dtype=torch.int64, pin_memory=pinned)  # tokens; their positions
        self._tokens = torch.zeros(2, rows, dtype=torch.int64, device=head.device)
        self._top = [torch.zeros(rows, 2, pin_memory=pinned) for _ in capacities]
        self._decodes: dict[tuple[int, int], tuple[Run, Made]] = {}

    def run(self, batches: Sequence[Batch]) -> list[Logits]:
        # DeviceLogits are arrays in all that samplers do with them.
        return cast("list[Logits]", [self._run(batch) for batch in batches])

    def _run(self, batch: Batch) -> DeviceLogits:
        """One copy to the device, one back: of the largest logits and their tokens."""
        import torch

        rows = len(batch.input_ids)
        if batch.input_ids.shape[1] == 1 and batch.first == 0:
            launch, (logits, top) = self.decode(batch)
            launch()
        else:
            logits, top = self.prefill(batch)
        target = self._top[batch.pool][batch.first : batch.first + rows]
        target.copy_(top[:rows], non_blocking=True)
        if top.is_cuda:
            torch.cuda.current_stream().synchronize()
        return DeviceLogits(target.numpy(), self.vocabulary, lambda wanted: logits[list(wanted)].cpu().numpy())

    def prefill(self, batch: Batch, *, compiled: bool = False) -> Made:
        """Lengths come and go, so a prompt is computed eagerly unless asked for."""
        import torch

        device, (_, length) = self._tokens.device, batch.input_ids.shape
        positions = torch.from_numpy(batch.write_indices[:, None] + np.arange(length)).to(device)
        ids = torch.from_numpy(np.ascontiguousarray(batch.input_ids)).to(device)
        block = self._compiled if compiled else self._eager
        return self._forward(ids, positions, batch.pool, batch.first, block, fresh=not batch.write_indices.any())

    def decode(self, batch: Batch) -> tuple[Run, Made]:
        """What launches this step, as often as one likes, and where its results will lie; padding rows come last."""
        import torch

        rows = len(batch.input_ids)
        padded = min(1 << (rows - 1).bit_length(), self.rows)
        self._given[0, :padded], self._given[1, :padded] = 0, self.capacities[batch.pool] - 1
        self._given[0, :rows] = torch.from_numpy(batch.input_ids[:, 0])
        self._given[1, :rows] = torch.from_numpy(batch.write_indices)
        self._tokens.copy_(self._given, non_blocking=True)
        key = (batch.pool, padded)
        if key not in self._decodes:
            ids, positions = self._tokens[0, :padded, None], self._tokens[1, :padded, None]
            step = partial(self._forward, ids, positions, batch.pool, 0, self._compiled, fresh=False)
            self._decodes[key] = captured(step) if self.graphs else _in_place(step)
        return self._decodes[key]

    def _forward(
        self, ids: torch.Tensor, positions: torch.Tensor, pool: int, first: int, block: Any, *, fresh: bool
    ) -> Made:
        import torch

        inner, rows = self.model.model, slice(first, first + len(ids))
        with torch.no_grad():
            x = inner.embed_tokens(ids)
            angles = inner.rotary_emb(x, positions)
            slots = torch.arange(self.capacities[pool], device=ids.device)
            mask = None if fresh else slots <= positions[:, None, :, None]
            for layer, keys, values in zip(inner.layers, *self._caches[pool], strict=True):
                cache = _LayerCache(keys[rows], values[rows], positions, fresh)
                x = block(layer, x, attention_mask=mask, position_embeddings=angles, past_key_values=cache)
            logits = self.model.lm_head(inner.norm(x[:, -1])).float()
            largest, tokens = logits.max(1)
            return logits, torch.stack([largest, tokens.float()], 1)

    def copy(self, copies: Sequence[Copy]) -> None:
        for source, target, tokens in copies:
            for part in range(2):
                row = self._caches[target.pool][part][:, target.place]  # [layers, kv_heads, capacity, head_dim]
                if source is not None:
                    row[..., :tokens, :] = self._caches[source.pool][part][:, source.place, :, :tokens]
                row[..., tokens:, :] = 0

    def encode(self, row: Row, source: Tokens) -> None:
        raise ServerFault("a Llama has no encoder")

    def lost(self) -> bool:
        return False

    def reset(self) -> None:
        for part in itertools.chain(*self._caches):
            part.zero_()

    def close(self) -> None:
        self._decodes.clear()
        self._caches.clear()


def captured(step: Callable[[], Any]) -> tuple[Run, Any]:
    """What launches the step as a CUDA graph, and where its results will lie."""
    import torch

    for _ in range(3):  # compiled and warm: a capture allows neither
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = step()
    return graph.replay, made


def _in_place(step: Callable[[], Made]) -> tuple[Run, Made]:
    """The same without a graph: the results of each call are copied to one place."""
    logits, top = (tensor.clone() for tensor in step())

    def run() -> None:
        for target, made in zip((logits, top), step(), strict=True):
            target.copy_(made)

    return run, (logits, top)


@cache
def _compiled(block: Callable[..., Any], compiler: str) -> Callable[..., Any]:
    """Compiled once for each shape, and for all layers and executors of the process."""
    import torch

    settings: Any = torch._dynamo.config
    settings.recompile_limit = 64  # a shape is a compilation, and after 8 of them Dynamo would give up
    return torch.compile(block, backend=compiler, fullgraph=True, dynamic=False)
