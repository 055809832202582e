"""Causal language models -> one standard ONNX graph for prefill and decode.

Inputs, for `batch` rows that stand at positions of their own:
    input_ids      int64 [batch, length]   the next tokens of each row, padded on the right
    write_indices  int64 [batch]           tokens that the row's cache already holds
    last_index     int64 [batch]           where in `length` the row's last real token stands
    key_cache_{i}, value_cache_{i}         [batch, kv_heads, capacity, head_dim] of layer i, fp32 or fp16
Outputs:
    logits         float32 [batch, vocabulary]   behind each row's last real token
    new_key_cache_{i}, new_value_cache_{i}       the caches with the new tokens; may share the inputs' memory

A row attends to the slots up to each token's own position, so padding is never seen: what it writes lies behind the
row's last token, and the next step overwrites it. `write_indices + length` must not pass `capacity`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from builders.artifacts import Checkpoint, Generation, GenerationQuality, OnnxGraph
from builders.errors import UnsupportedError
from builders.export.rewrites import cache_layers, exportable, last_tokens, operator_attention
from builders.export.tokenizer import require_tokenizer
from builders.export.weights import load_weights, require_interface, require_sound
from builders.export.write import write_program
from builders.graph import GRAPH_FILE, record_graph, require_standard
from builders.judging import parity
from builders.judging.perplexity import graph_perplexity, model_logits, model_perplexity, require_perplexity, token_rows

if TYPE_CHECKING:
    import torch

MAX_RATIO = {"fp32": 1.001, "fp16": 1.01}  # of the perplexity to that of the fp32 checkpoint
_EXAMPLE_CAPACITY = 13
_PAST_WINDOW = 16  # tokens that the parity check goes past a sliding window


def export_decoder(
    checkpoint: Checkpoint, precision: Literal["fp32", "fp16"], texts: Sequence[str], out: Path
) -> OnnxGraph:
    """Writes `graph.onnx` into `out`, checked against the eager fp32 model on `texts`.

    Raises CheckpointError when weights are missing or do not fit the tokenizer; UnsupportedError for an attention that
    the operator cannot express; ParityError or QualityError when the graph computes something else.
    """
    require_tokenizer(checkpoint, texts)
    model = load_weights(checkpoint)
    require_interface(model, checkpoint)
    windows = layer_windows(model.config.get_text_config(), checkpoint.max_length)
    longest = max(parity.LENGTH, *(window + _PAST_WINDOW for window in windows if window), 0)
    rows = token_rows(checkpoint, texts)
    few = np.resize(rows, (parity.ROWS, min(longest, checkpoint.max_length)))  # repeats texts to get past a window
    expected = np.concatenate([model_logits(model, row[None]) for row in few])
    require_sound(expected, checkpoint)
    reference = model_perplexity(model, rows)
    file = out / GRAPH_FILE
    assert checkpoint.generation is not None
    write_graph(
        model.half() if precision == "fp16" else model, checkpoint.generation, checkpoint.max_length, windows, file
    )
    require_standard(file)
    difference = parity.require_parity(file, few, expected, precision, checkpoint.source)
    perplexity, executor = graph_perplexity(file, rows)
    quality = GenerationQuality(
        perplexity=perplexity,
        reference_perplexity=reference,
        tokens=rows[:, 1:].size,
        executor=executor,
        max_relative_difference=difference,
    )
    require_perplexity({precision: quality}, MAX_RATIO[precision], f"graph of {checkpoint.source}")
    return record_graph(out, precision, quality, checkpoint.digest)


def layer_windows(config: Any, positions: int) -> tuple[int | None, ...]:
    """Tokens that each layer looks back on, itself included; None: all of the `positions` that can occur.

    Raises UnsupportedError for layers that are neither full nor sliding attention.
    """
    window = getattr(config, "sliding_window", None)
    # Without a list of layer types, transformers slides in every layer or in none.
    every = "sliding_attention" if window else "full_attention"
    kinds = getattr(config, "layer_types", None) or [every] * config.num_hidden_layers
    unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if unknown:
        raise UnsupportedError(
            f"layers of {config.model_type}", got=", ".join(unknown), expected="full_attention or sliding_attention",
            fix="use a model whose layers all keep keys and values",
        )  # fmt: skip
    sliding = window if window and window < positions else None
    return tuple(sliding if kind == "sliding_attention" else None for kind in kinds)


def write_graph(model: Any, facts: Generation, positions: int, windows: Sequence[int | None], file: Path) -> None:
    import torch

    module = _graph_module(model, windows, positions)
    shape = (3, facts.kv_heads, _EXAMPLE_CAPACITY, facts.head_dim)
    caches = [torch.zeros(shape, dtype=model.dtype) for _ in range(2 * facts.layers)]
    names = [f"{part}_cache_{layer}" for layer in range(facts.layers) for part in ("key", "value")]
    with exportable(model, positions, module.attention):
        write_program(
            module,
            (torch.zeros(3, 5, dtype=torch.int64), torch.tensor([0, 2, 7]), torch.full((3,), 4), *caches),
            [{0: "batch", 1: "length"}, {0: "batch"}, {0: "batch"}, *[{0: "batch", 2: "capacity"}] * len(caches)],
            ["input_ids", "write_indices", "last_index", *names],
            ["logits", *[f"new_{name}" for name in names]],
            file,
        )
    if module.served != set(range(facts.layers)):
        raise UnsupportedError(
            f"attention of {model.config.model_type}", got=f"the interface serves layers {sorted(module.served)}",
            expected=f"all of 0 to {facts.layers - 1}", fix="use a model whose layers all attend in the usual way",
        )  # fmt: skip


def _graph_module(model: Any, windows: Sequence[int | None], positions: int) -> Any:
    import torch
    from transformers.cache_utils import Cache

    class DecoderGraph(torch.nn.Module):
        """The model with positions, masks and caches spelled out."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.masks: dict[int | None, torch.Tensor] = {}
            self.served: set[int] = set()

        def forward(
            self, input_ids: torch.Tensor, write_indices: torch.Tensor, last_index: torch.Tensor, *caches: torch.Tensor
        ) -> tuple[torch.Tensor, ...]:
            slots = torch.arange(caches[0].shape[2])[None, None, None]
            rows = write_indices[:, None] + torch.arange(input_ids.shape[1])[None]  # [batch, length]
            seen = rows[:, None, :, None]
            self.masks = {None: slots <= seen}  # [batch, 1, length, capacity]
            for window in {window for window in windows if window is not None}:
                self.masks[window] = (slots <= seen) & (slots > seen - window)
            layers = cache_layers(caches, write_indices)
            with last_tokens(self.model, last_index):
                logits = self.model(
                    input_ids=input_ids,
                    attention_mask=self.masks[None],  # returned as it is; `attention` chooses among the masks
                    position_ids=rows.clamp(max=positions - 1),  # padding may run off the table
                    past_key_values=Cache(layers=layers),
                    use_cache=True,
                ).logits
            return (logits[:, 0].float(), *[part for layer in layers for part in (layer.keys, layer.values)])

        def attention(
            self,
            module: Any,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            mask: torch.Tensor,
            scaling: float | None = None,
            softcap: float | None = None,
            sliding_window: int | None = None,
            s_aux: torch.Tensor | None = None,
            **_: Any,
        ) -> tuple[torch.Tensor, None]:
            """Served to transformers' attention interface."""
            window = windows[module.layer_idx]
            if s_aux is not None or ((sliding_window or positions) < positions and sliding_window != window):
                raise UnsupportedError(
                    f"attention of {type(model).__name__}, layer {module.layer_idx}",
                    got="attention sinks" if s_aux is not None else f"a window of {sliding_window}",
                    expected=f"softmax attention over {window or 'all'} tokens", fix="use another model",
                )  # fmt: skip
            self.served.add(module.layer_idx)
            return operator_attention(query, key, value, self.masks[window], scaling, softcap)

    return DecoderGraph()
