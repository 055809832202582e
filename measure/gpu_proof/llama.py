"""A Llama in plain torch, with caches of fixed length, behind the seam that engines stand behind.

It is the peer that an engine must beat, and what the serving loop runs on where no engine does. Weights are random or
those of a transformers model. A step of one token a row is a CUDA graph, as gpt-fast and vLLM have it: captured once,
then launched as one. Blocks are compiled one for all, so that compiling takes seconds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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

EPSILON, THETA = 1e-6, 10_000.0  # transformers' defaults for a LlamaConfig


@dataclass(frozen=True, eq=False)
class Block:
    """`qkv` [(heads + 2 kv_heads) head_dim, hidden], `gate_up` [2 ffn, hidden]: one product each."""

    norm: torch.Tensor
    qkv: torch.Tensor
    out: torch.Tensor
    ffn_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


@dataclass(frozen=True, eq=False)
class Llama:
    """`cosine` and `sine` are [positions, head_dim]."""

    shape: DecoderShape
    table: torch.Tensor
    blocks: tuple[Block, ...]
    norm: torch.Tensor
    head: torch.Tensor
    cosine: torch.Tensor
    sine: torch.Tensor


def random_llama(shape: DecoderShape, positions: int, dtype: str, device: str) -> Llama:
    """Weights of deviation 0.02, made on the device; norms of one."""
    import torch

    generator = torch.Generator(device).manual_seed(0)
    options: dict[str, Any] = {"dtype": getattr(torch, dtype), "device": device}

    def weight(*sizes: int) -> torch.Tensor:
        return torch.empty(sizes, **options).normal_(0, 0.02, generator=generator)

    def norm() -> torch.Tensor:
        return torch.ones(shape.hidden, **options)

    width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    blocks = tuple(
        Block(
            norm(),
            weight(width, shape.hidden),
            weight(shape.hidden, shape.hidden),
            norm(),
            weight(2 * shape.ffn, shape.hidden),
            weight(shape.hidden, shape.ffn),
        )
        for _ in range(shape.layers)
    )
    table, head = weight(shape.vocabulary, shape.hidden), weight(shape.vocabulary, shape.hidden)
    return Llama(shape, table, blocks, norm(), head, *_angles(shape, positions, options))


def llama_of(model: Any, positions: int) -> Llama:
    """The weights of a transformers LlamaForCausalLM, where they lie."""
    import torch

    config, inner = model.config, model.model
    shape = DecoderShape(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        ffn=config.intermediate_size,
        vocabulary=config.vocab_size,
    )
    blocks = tuple(
        Block(
            layer.input_layernorm.weight.detach(),
            torch.cat([getattr(layer.self_attn, f"{name}_proj").weight.detach() for name in "qkv"]),
            layer.self_attn.o_proj.weight.detach(),
            layer.post_attention_layernorm.weight.detach(),
            torch.cat([layer.mlp.gate_proj.weight.detach(), layer.mlp.up_proj.weight.detach()]),
            layer.mlp.down_proj.weight.detach(),
        )
        for layer in inner.layers
    )
    table, head = inner.embed_tokens.weight.detach(), model.lm_head.weight.detach()
    options = {"dtype": table.dtype, "device": table.device}
    return Llama(shape, table, blocks, inner.norm.weight.detach(), head, *_angles(shape, positions, options))


def _angles(shape: DecoderShape, positions: int, options: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    half = torch.arange(0, shape.head_dim, 2, device=options["device"]) / shape.head_dim
    angles = torch.outer(torch.arange(positions, device=options["device"]), THETA**-half)
    both = torch.cat([angles, angles], dim=1)  # [positions, head_dim]
    return both.cos().to(options["dtype"]), both.sin().to(options["dtype"])


@functools.cache
def _block_function(shape: DecoderShape, compiler: str | None) -> Callable[..., Any]:
    """One block on [rows, length, hidden]. Writes the caches, [rows, kv_heads, capacity, head_dim], where they lie.

    `fresh`: the caches hold nothing before these tokens, so attention is causal among them. Otherwise every slot of
    the cache is read under a mask: a static shape, as a CUDA graph wants it. Compiled once for each shape, and for
    all layers and executors of the process.
    """
    import torch
    from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu

    heads, kv, size = shape.heads, shape.kv_heads, shape.head_dim
    group = heads // kv

    def rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
        low, high = x.chunk(2, dim=-1)
        return x * cosine + torch.cat([-high, low], dim=-1) * sine

    def masked(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        rows, length = positions.shape
        # The query heads that share a key head are one matrix, so that no key is read twice.
        grouped = q.view(rows, length, kv, group, size).permute(0, 2, 3, 1, 4).reshape(rows, kv, group * length, size)
        scores = torch.matmul(grouped, keys.transpose(-1, -2)) * size**-0.5
        slots = torch.arange(keys.shape[2], device=q.device)
        unseen = (slots > positions[:, None, :, None]).expand(rows, group, length, -1).flatten(1, 2)
        weights = scores.float().masked_fill(unseen[:, None], float("-inf")).softmax(-1).to(q.dtype)
        seen = torch.matmul(weights, values).view(rows, kv, group, length, size)
        return seen.permute(0, 3, 1, 2, 4).reshape(rows, length, heads * size)

    def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        seen = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return seen.transpose(1, 2).flatten(2)

    def block(
        x: torch.Tensor,
        weights: tuple[torch.Tensor, ...],
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor],
        fresh: bool,
    ) -> torch.Tensor:
        norm, qkv, out, ffn_norm, gate_up, down = weights
        rows, length, hidden = x.shape
        joined = linear(rms_norm(x, (hidden,), norm, EPSILON), qkv).view(rows, length, heads + 2 * kv, size)
        q, k, v = torch.split(joined, [heads, kv, kv], dim=2)
        q, k = rotate(q, *angles), rotate(k, *angles)
        at = torch.arange(rows, device=x.device)[:, None]
        keys[at, :, positions], values[at, :, positions] = k, v
        x = x + linear(causal(q, k, v) if fresh else masked(q, keys, values, positions), out)
        gate, up = linear(rms_norm(x, (hidden,), ffn_norm, EPSILON), gate_up).chunk(2, dim=-1)
        return x + linear(silu(gate) * up, down)

    if compiler is None:
        return block
    settings: Any = torch._dynamo.config
    settings.recompile_limit = 64  # a shape is a compilation, and after 8 of them Dynamo would give up
    return torch.compile(block, backend=compiler, fullgraph=True, dynamic=False)


class TorchStepExecutor:
    """A `StepExecutor`. `compiler` is torch.compile's backend for steps of one token a row; `graphs`: these steps are
    captured and launched as CUDA graphs.

    Steps are made for 1, 2, 4, … rows and padded to the next, so that there are few of them. A padding row writes to
    the last position of a row that is not decoding, which its own token overwrites before anything reads it.
    """

    stages = 1

    def __init__(
        self, model: Llama, capacities: Sequence[int], rows: int, *, compiler: str | None = None, graphs: bool = False
    ) -> None:
        import torch

        self.model, self.capacities, self.rows, self.graphs = model, tuple(capacities), rows, graphs
        self.vocabulary = model.shape.vocabulary
        table, shape = model.table, model.shape
        self._eager, self._compiled = _block_function(shape, None), _block_function(shape, compiler)
        # Keys and values apart: tensors that share memory and are written to are slow to call compiled code with.
        self._caches = [
            tuple(
                torch.zeros(
                    shape.layers, rows, shape.kv_heads, size, shape.head_dim, dtype=table.dtype, device=table.device
                )
                for _ in range(2)
            )
            for size in capacities
        ]
        position_bytes = 2 * shape.layers * shape.kv_heads * shape.head_dim * table.itemsize
        weights = (table, model.head, *(tensor for block in model.blocks for tensor in vars(block).values()))
        self.call_cost = sum(tensor.nbytes for tensor in weights) // position_bytes
        pinned = table.device.type == "cuda"
        self._given = torch.zeros(2, rows, dtype=torch.int64, pin_memory=pinned)  # tokens; their positions
        self._tokens = torch.zeros(2, rows, dtype=torch.int64, device=table.device)
        self._top = [torch.zeros(rows, 2, pin_memory=pinned) for _ in capacities]
        self._decodes: dict[tuple[int, int], tuple[Callable[[], object], Made]] = {}

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
        fresh = not batch.write_indices.any()
        return self._forward(ids, positions, batch.pool, batch.first, block, fresh=fresh)

    def decode(self, batch: Batch) -> tuple[Callable[[], object], Made]:
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
            self._decodes[key] = self._captured(
                lambda: self._forward(ids, positions, batch.pool, 0, self._compiled, fresh=False)
            )
        return self._decodes[key]

    def _captured(self, step: Callable[[], Made]) -> tuple[Callable[[], object], Made]:
        """The step as a CUDA graph; where there is none, a call that writes its results to one place."""
        import torch

        logits, top = (tensor.clone() for tensor in step())  # compiled and warm: a capture allows neither

        def plain() -> None:
            for target, made in zip((logits, top), step(), strict=True):
                target.copy_(made)

        if not self.graphs:
            return plain, (logits, top)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            made = step()
        return graph.replay, made

    def _forward(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        pool: int,
        first: int,
        block_of: Callable[..., Any],
        *,
        fresh: bool,
    ) -> Made:
        import torch
        from torch.nn.functional import linear, rms_norm

        model, rows = self.model, slice(first, first + len(ids))
        keys, values = self._caches[pool]  # [layers, rows, kv_heads, capacity, head_dim]
        with torch.no_grad():
            x = model.table[ids]
            angles = model.cosine[positions][:, :, None], model.sine[positions][:, :, None]  # [rows, length, 1, size]
            for layer, block in enumerate(model.blocks):
                weights = tuple(vars(block).values())
                x = block_of(x, weights, keys[layer, rows], values[layer, rows], positions, angles, fresh)
            last = rms_norm(x[:, -1], (x.shape[-1],), model.norm, EPSILON)
            logits = linear(last, model.head).float()
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
        for keys, values in self._caches:
            keys.zero_()
            values.zero_()

    def close(self) -> None:
        self._decodes.clear()
        self._caches.clear()
